#include "spectral/half_step.h"

#include <algorithm>

#include "spectral/half_step.cuh"

namespace sn_fast {

int parallel_blocks(int device) { return kBlocksPerMultiprocessor * multiprocessors(device); }

template <Precision kPrecision>
static void launch_in(const HalfStepParams& params, const Stream& stream, bool early) {
    const unsigned blocks = static_cast<unsigned>(std::min(params.n_units, parallel_blocks(stream.device)));
    launch(half_step_kernel<kPrecision>, "half_step", blocks, kTileThreads, sizeof(HalfStepShared), stream, params, early);
}

void launch_half_step(const HalfStepParams& params, const Stream& stream, bool early) {
    switch (params.precision) {
        case Precision::kFloat32: return launch_in<Precision::kFloat32>(params, stream, early);
        case Precision::kTf32: return launch_in<Precision::kTf32>(params, stream, early);
        case Precision::kTf32x3: return launch_in<Precision::kTf32x3>(params, stream, early);
        case Precision::kBfloat16: return launch_in<Precision::kBfloat16>(params, stream, early);
    }
}

}  // namespace sn_fast
