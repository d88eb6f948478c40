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

    __device__ double step(unsigned size, double room) const { return size == cut ? part * room : 0.0; }
};

// `visit(body)` calls body(bits of |g|, room) for each of this thread's elements that can move: |g| > 0, room >= 0.
// `largest` is the largest of all |g|. The cut is the largest |g| at which the rooms of the elements from there upwards
// add up to `budget`, and 0 if all of them are smaller: bits of positive floats are in the order of the floats, so four
// probes in each pass find it in at most 16.
template <class Visit>
__device__ Fill fill_steepest(const Visit& visit, double budget, unsigned largest, double* scratch) {
    constexpr unsigned kProbes = 4;
    // 1) The cut lies in [low, high]; where no |g| reaches the budget, at low = 0.
    unsigned low = 0, high = largest;
    while (low < high) {
        unsigned probes[kProbes];
        double rooms[kProbes] = {};
#pragma unroll
        for (unsigned i = 0; i < kProbes; ++i)
            probes[i] = low + static_cast<unsigned>((static_cast<unsigned long long>(high - low) * (i + 1) + 3) / 4);
        visit([&](unsigned size, double room) {
#pragma unroll
            for (unsigned i = 0; i < kProbes; ++i) rooms[i] += size >= probes[i] ? room : 0.0;
        });
        block_reduce(rooms, Add{}, scratch);
        unsigned next = low, end = probes[0] - 1;
#pragma unroll
        for (unsigned i = 0; i < kProbes; ++i)
            if (rooms[i] >= budget) {
                next = probes[i];
                end = i + 1 < kProbes ? probes[i + 1 < kProbes ? i + 1 : i] - 1 : high;
            }
        low = next;
        high = end;
    }
    // 2) What the full elements leave is shared.
    double rooms[2] = {};
    visit([&](unsigned size, double room) {
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
