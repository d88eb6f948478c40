// x_adv + step * (eps * g - (x_adv - x)), then clipped: one launch, 4 passes.
#pragma once

#include "attacks/samples.cuh"
#include "attacks/wrm_step.h"

namespace sn_fast {

__global__ void __launch_bounds__(kChunkThreads) wrm_step_chunk(WrmStep p) {
    // 1) This thread's chunk: everything is read before anything is used.
    const Chunk c = chunk_of_thread(p.samples);
    if (c.sample == p.samples.count) return;
    const Raw start = load(p.x_adv, c), centre = load(p.x, c), gradient = load(p.grad, c);
    Values z = decode(start, p.x_adv.dtype);
    const Values x = decode(centre, p.x.dtype), g = decode_gradient(gradient, p.grad.dtype);
    // 2) Part of the way to x + eps g; a step of 1 gets there exactly.
    const float eps = p.eps.of(c.sample);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) z.at[e] = lerp(z.at[e], x.at[e] + eps * g.at[e], p.step);
    // 3) Clip, round, write.
    clip(z, p.lower, p.upper, c);
    store(p.out, c, encode(z, p.out.dtype));
}

}  // namespace sn_fast
