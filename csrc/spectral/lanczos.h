// A start for power iteration: Golub-Kahan-Lanczos bidiagonalisation of many operators at once, with full
// reorthogonalisation, and the leading singular vectors of what it found.
#pragma once

#include <cstdint>
#include <vector>

#include "core/launch.h"
#include "spectral/gather.h"

namespace sn_fast {

// One group of one operator: its part of all operators' vectors, on the side that the first half step reads (start)
// and on the other one (image).
struct Span {
    std::int32_t start_first, start_length;
    std::int32_t image_first, image_length;
};

struct Lanczos {
    const Gather* gathers;  // plan as in PowerStep
    const Unit* units;
    const std::int32_t* table;
    const Span* spans;
    int n_units[2];
    int n_spans;
    int n_iterations;  // at most kMaxLanczos
    std::vector<std::uintptr_t> weights;
    std::vector<int> offsets[2];  // of each operator's vectors: start side, image side
    std::int64_t sizes[2];        // of all operators' vectors
    float* bases[2];              // n_iterations vectors each; the first of the start side is given
    float* results[2];
    double* norms;                // of the half steps; not used
    double* diagonal;             // [span][n_iterations]
    double* off_diagonal;
    float* partials;
    std::int32_t* counters;
    int n_counters;
};

void lanczos(const Lanczos& lanczos, const Stream& stream);

}  // namespace sn_fast
