// Whether the weights of many operators still have the content that they had: a 64-bit hash of each, compared on the
// device, so that the host need not wait. sn_fast/ops/fingerprint.py defines the hash and what a record holds.
#pragma once

#include <cstdint>

#include "core/launch.h"
#include "spectral/half_step.h"

namespace sn_fast {

constexpr int kWordDigits = 6;

// The elements of one weight, dense in memory. sn_fast/ops/records.py writes it: same fields, same order.
struct Words {
    std::int32_t dtype;
    std::int32_t units;    // blocks that read them
    std::int32_t samples;  // elements that the record keeps
    std::int32_t sample;   // in `table`: where in memory those are
    std::int32_t digits;   // of an element's place in memory, fastest first; 0: the place is the logical index
    std::int32_t size[kWordDigits];
    std::int32_t stride[kWordDigits];  // in logical order
};

// The part of a weight that one block reads.
struct WordsUnit {
    std::int32_t op;
    std::int32_t first, count;  // places in memory
};

// What the comparison found of a weight.
enum class Change : std::int32_t {
    kNone = 0,
    kMoved = 1,
    kReplaced = 2,  // so far from the weight before that singular vectors of that one say little
};

struct FingerprintParams {
    const Words* words;
    const WordsUnit* units;
    const std::int32_t* table;
    int n_operators;
    bool force;                // every weight counts as changed
    float replaced;            // share of a weight's norm that is no multiple of the old weight, squared
    unsigned long long* sums;  // one per operator, 0 at the start, as `arrived` and `changes`
    std::int32_t* arrived;
    std::int32_t* changes;  // Change of every operator, then the number of those that have changed
    std::int32_t* alarms;   // null, or per operator 1 where its weight was replaced; stays until the host has seen it
    const void* weights[kMaxOperators];
    std::int64_t* records[kMaxOperators];  // the hash, then the sampled words; renewed where the weight has changed
};

static_assert(sizeof(FingerprintParams) <= 4096, "kernel parameters");

void launch_fingerprint(const FingerprintParams& params, int n_units, const Stream& stream);

}  // namespace sn_fast
