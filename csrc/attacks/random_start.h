// A point drawn uniformly from the ball around x, then clipped.
#pragma once

#include "attacks/pgd_step.h"

namespace sn_fast {

// From an element's place in memory to its logical index, both inside a sample: digits of the place, fastest
// first. Samples have fewer than 2^31 elements where there are digits.
struct LogicalIndex {
    static constexpr int kMaxDigits = 8;

    int digits = 0;  // 0: they are equal
    Divisor sizes[kMaxDigits];
    long long strides[kMaxDigits] = {};  // in logical order

    __device__ long long of(long long place) const {
        if (digits == 0) return place;
        unsigned left = static_cast<unsigned>(place);
        long long index = 0;
        for (int d = 0; d < digits; ++d) {
            const unsigned next = sizes[d].quotient(left);
            index += (left - next * sizes[d].value) * strides[d];
            left = next;
        }
        return index;
    }
};

struct RandomStart {
    Samples samples;
    Elements out, x;
    Amount eps;
    Bound lower, upper;
    const std::uint64_t* seed = nullptr;  // one number, in device memory: drawing it needs no wait
    LogicalIndex logical;
    bool keeps_point = false;  // a sample's point fits on chip
};

void random_start(RandomStart start, Norm norm, long long resident_bytes, const Stream& stream);

}  // namespace sn_fast
