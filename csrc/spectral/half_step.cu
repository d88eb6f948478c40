#include "spectral/half_step.h"

namespace sn_fast {

int parallel_blocks(int device) { return kBlocksPerMultiprocessor * multiprocessors(device); }

void launch_half_step(const HalfStepParams& params, const Stream& stream, bool early) {
    switch (params.precision) {
        case Precision::kFloat32: return launch_half_step_in<Precision::kFloat32>(params, stream, early);
        case Precision::kTf32: return launch_half_step_in<Precision::kTf32>(params, stream, early);
        case Precision::kTf32x3: return launch_half_step_in<Precision::kTf32x3>(params, stream, early);
        case Precision::kBfloat16: return launch_half_step_in<Precision::kBfloat16>(params, stream, early);
    }
}

}  // namespace sn_fast
