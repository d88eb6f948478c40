// A start for power iteration: Golub-Kahan-Lanczos bidiagonalisation of many operators at once, with full
// reorthogonalisation, and the leading singular vectors of what it found.
#pragma once

#include <cstdint>
#include <vector>

#include "core/launch.h"
#include "spectral/plan.h"

namespace sn_fast {

// What one block works on: a part of one group's vectors, on the side that the first half step reads (start) or on the
// other one (image). The parts of a group are neighbours.
struct Part {
    std::int32_t span;           // number of the group among those of all operators
    std::int32_t first, length;  // elements, among all operators' vectors on this side
    std::int32_t number, parts;  // of this group
    std::int32_t whole;          // length of the group's vector
};

constexpr int kMaxLanczos = 32;
constexpr int kLanczosPasses = 3;  // of an orthogonalisation that leave partial sums

struct Lanczos {
    const OperatorMap* maps;  // plan as in PowerStep
    const WorkItem* items;
    const std::int32_t* table;
    const Part* parts[2];  // start side, image side
    int n_items[2];
    int n_parts[2];
    int n_iterations;  // at most kMaxLanczos
    std::vector<std::uintptr_t> weights;
    std::vector<int> offsets[2];  // of each operator's vectors: start side, image side
    std::int64_t sizes[2];        // of all operators' vectors
    float* bases[2];              // n_iterations vectors each; the first of the start side is given
    float* results[2];
    double* norms;     // scratch of the half steps
    double* diagonal;  // [span][n_iterations]
    double* off_diagonal;
    double* sums;  // [kLanczosPasses][the more parts of the two sides][n_iterations + 1]
    float* partials;
    std::int32_t* counters;
    int n_counters;
};

void lanczos(const Lanczos& lanczos, const Stream& stream);

}  // namespace sn_fast
