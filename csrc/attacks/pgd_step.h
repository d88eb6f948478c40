// One step of projected gradient ascent, and the projection alone: a step without a gradient.
#pragma once

#include <vector>

#include "attacks/samples.h"

namespace sn_fast {

enum class Norm : int { kInf = 0, kL2 = 1, kL1 = 2, kL1Exact = 3 };  // shared with Python

struct PgdStep {
    Samples samples;
    Elements out, x_adv, x, grad;  // x is read only where there is a ball; grad null: projection
    Amount eps, alpha;
    Bound lower, upper;
    const bool* active = nullptr;  // (B,); null: all
    bool targeted = false;
    bool ball = false;  // false: the radius is infinite for all
    // A sample that does not fit on chip is cut into tiles; each leaves kSums sums.
    double* partials = nullptr;  // (B, tiles, kSums)
    long long tiles = 0, chunks_per_tile = 0;
};

constexpr int kSums = 3;

// How many numbers of float64 `partials` must hold, for a step that reads tensors of `dtypes`; 0 where a sample fits on
// `resident_bytes` of shared memory, or needs none.
long long pgd_step_partials(const Samples& samples, const std::vector<Dtype>& dtypes, Norm norm,
                            long long resident_bytes);

void pgd_step(PgdStep step, Norm norm, long long resident_bytes, const Stream& stream);

}  // namespace sn_fast
