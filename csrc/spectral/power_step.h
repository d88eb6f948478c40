// One power iteration of many operators at once: u = A v / |A v|, w = A^T u, sigma = |w|, v = w / sigma (matrices start
// from u). Two launches do it, one per half step, and a third scales the vectors and finds sigma.
#pragma once

#include <cstdint>
#include <vector>

#include "core/launch.h"
#include "spectral/plan.h"

namespace sn_fast {

// Where sigma of one operator goes, and the group that attains it (null: nobody asks).
struct Targets {
    float* sigma;
    std::int64_t* group;
};

// Where the state goes once more, for one forward: tensors that nothing writes to any more. Null: nowhere.
struct Copies {
    float* vectors[2];  // laid out as the results
    float* sigmas;
    std::int64_t* groups;
};

// Everything on the device, sizes in elements. `maps` and `items` hold the first half step's, then the second's.
struct PowerStep {
    const OperatorMap* maps;
    const WorkItem* items;
    const VectorSlice* slices;
    const std::int32_t* table;
    int n_items[2];
    int n_slices;
    std::vector<std::uintptr_t> weights;
    std::vector<std::uintptr_t> given[2];  // start of the first half step; its result where there is no other
    float* results[2];                     // of the two half steps: all operators' vectors, one after the other
    float* sigmas;
    std::int64_t* groups;
    const Targets* targets;  // null, or the vectors replace those given, and sigma and group go there
    double* norms[2];
    float* partials;
    std::int32_t* counters;  // of items taken, one per half step; then of parts, as the items number them
    int n_counters;
    bool counters_are_zero;
    int precision;
    const std::int32_t* changes;  // null: all are iterated. Else those that have changed, see HalfStepParams
    Copies copies;
};

void power_step(const PowerStep& step, const Stream& stream);

// The product of one of the half steps alone, `half` 0 or 1, of the vectors given for it: not normalised, in `results`.
void half_step(const PowerStep& step, int half, const Stream& stream);

// Sizes of the plan's structs, for sn_fast/ops/plan.py to compare with its own.
std::vector<int> plan_struct_sizes();

}  // namespace sn_fast
