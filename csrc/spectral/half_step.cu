#include "spectral/half_step.h"

#include <algorithm>

#include "spectral/half_step.cuh"

namespace sn_fast {

int parallel_blocks(int device) { return kBlocksPerMultiprocessor * multiprocessors(device); }

void launch_half_step(const HalfStepParams& params, const Stream& stream) {
    const unsigned blocks = static_cast<unsigned>(std::min(params.n_units, parallel_blocks(stream.device)));
    launch(half_step_kernel, "half_step", blocks, kTileThreads, sizeof(HalfStepShared), stream, params);
}

}  // namespace sn_fast
