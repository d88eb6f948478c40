#include "spectral/half_step.cuh"

namespace sn_fast {

template void launch_half_step_in<Precision::kTf32>(const HalfStepParams&, const Stream&, bool);

}  // namespace sn_fast
