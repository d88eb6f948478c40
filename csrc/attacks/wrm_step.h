// One ascent step on loss(z) - |z - x|^2 / (2 eps).
#pragma once

#include "attacks/samples.h"

namespace sn_fast {

struct WrmStep {
    Samples samples;
    Elements out, x_adv, x, grad;
    Amount eps;  // negative: descent
    float step = 0.0f;
    Bound lower, upper;
};

void wrm_step(WrmStep step, const Stream& stream);

}  // namespace sn_fast
