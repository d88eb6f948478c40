#include "attacks/wrm_step.cuh"

namespace sn_fast {

void wrm_step(WrmStep p, const Stream& stream) {
    find_vectors(p.samples, {&p.out, &p.x_adv, &p.x, &p.grad, &p.lower.elements, &p.upper.elements});
    launch(wrm_step_chunk, "wrm_step_chunk", chunk_blocks(p.samples), kChunkThreads, 0, stream, p);
}

}  // namespace sn_fast
