// What a forward does with its weights' norms: the content of all weights is compared with their records, and where it
// has changed the state takes its iterations, in place. The host learns nothing, and waits for nothing.
#pragma once

#include <optional>

#include "spectral/fingerprint.h"
#include "spectral/power_step.h"

namespace sn_fast {

// The comparison of all weights with their records.
struct Content {
    FingerprintParams params;
    int n_units;
    void* zeroed;  // sums, changes and arrived, in one piece, and what else is to be zero
    std::size_t zeroed_bytes;
};

struct Refresh {
    PowerStep step;                  // in place; `changes`, `copies` and `counters_are_zero` follow from the rest
    Copies copies;                   // made by the last iteration
    std::optional<Content> content;  // none: everything is iterated. `zeroed` includes the step's counters
    int n_iterations;
};

void refresh(Refresh r, const Stream& stream);

// Compares, and renews the records where they differ.
void record(const Content& content, const Stream& stream);

// Sizes of the structs, for sn_fast/ops/records.py to compare with its own.
std::vector<int> record_struct_sizes();

}  // namespace sn_fast
