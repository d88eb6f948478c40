// Which elements of a sample move when those of largest gradient go to their bounds first: without sorting them.
#pragma once

#include "attacks/l1_threshold.cuh"

namespace sn_fast {

// Elements whose |g| is above `cut` (bits of a float32) are full: they go to their bound. Those equal to it move by
// `part` of their room, which they share what is left for in proportion.
struct Fill {
    unsigned cut = 0;
    double part = 0.0;

    __device__ bool is_full(unsigned size) const { return size > cut; }

    __device__ double step(unsigned size, float room) const { return size == cut ? part * room : 0.0; }
};

struct Larger {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};

// `visit(body)` calls body(bits of |g|, room) for each of this thread's elements that can move: |g| > 0, room >= 0.
// `largest` is the largest of all |g|. The cut is the largest |g| at which the rooms of the elements from there upwards
// add up to `budget`, and 0 if all of them are smaller. Bits of positive floats are in the order of the floats, so it is
// bracketed by integers: four probes in each pass. The cut is an element's, so the upper end of the bracket moves down to
// the largest element below it, and one of the probes is there: a bracket that holds a single element ends the search.
template <class Visit>
__device__ Fill fill_steepest(const Visit& visit, double budget, unsigned largest, double* scratch,
                              unsigned long long* top_scratch) {
    constexpr int kProbes = 4;
    // 1) The cut lies in [low, high]; where no |g| reaches the budget, at low = 0. Mostly few elements are full, so the
    // first probes are a quarter of an octave, one and four octaves below the largest.
    unsigned low = 0, high = largest;
    bool first = true;
    while (low < high) {
        unsigned probes[kProbes];
        double rooms[kProbes] = {};
        unsigned long long top = 0;
#pragma unroll
        for (int i = 0; i < kProbes; ++i) {
            const unsigned below = i < kProbes - 1 ? 1u << (25 - 2 * i) : 0u;
            const auto even = static_cast<unsigned>((static_cast<unsigned long long>(high - low) * (i + 1) + 3) / 4);
            probes[i] = !first ? low + even : high > below ? high - below : 1u;
        }
        visit([&](unsigned size, float room) {
            const double wide = room;
#pragma unroll
            for (int i = 0; i < kProbes; ++i) rooms[i] += size >= probes[i] ? wide : 0.0;
            if (size <= high && size > top) top = size;
        });
        block_reduce(rooms, Add{}, scratch);
        unsigned next = low, end = probes[0] - 1;
#pragma unroll
        for (int i = 0; i < kProbes; ++i)
            if (rooms[i] >= budget) {
                next = probes[i];
                end = i + 1 < kProbes ? probes[i + 1 < kProbes ? i + 1 : i] - 1 : high;
            }
        top = block_reduce(top, Larger{}, top_scratch);
        low = next;
        high = end < top ? end : static_cast<unsigned>(top);
        first = false;
    }
    // 2) What the full elements leave is shared.
    double rooms[2] = {};
    visit([&](unsigned size, float room) {
        if (size > low)
            rooms[0] += room;
        else if (size == low)
            rooms[1] += room;
    });
    block_reduce(rooms, Add{}, scratch);
    const double part = rooms[1] > 0.0 ? (budget - rooms[0]) / rooms[1] : 0.0;
    return {low, fmin(fmax(part, 0.0), 1.0)};
}

}  // namespace sn_fast
