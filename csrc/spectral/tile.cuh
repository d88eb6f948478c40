// What all kinds of tiles share: the scaled input vector, the joining of split sums, and the result's square sum.
#pragma once

#include "core/numeric.cuh"
#include "core/reduce.cuh"
#include "spectral/half_step.h"
#include "spectral/product.cuh"

namespace sn_fast {

// 1 / norm as a product of two factors: as one float it overflows for denormal norms.
struct Scale {
    float first, second;
    bool alive;  // false: the norm is zero or not finite
};

__device__ inline Scale inverse_norm(double square_sum) {
    if (!(square_sum > 0.0) || square_sum > 1.7e308) return {1.0f, 1.0f, false};
    const double norm = sqrt(square_sum);
    const int half = ilogb(norm) / 2;
    return {ldexpf(1.0f, -half), static_cast<float>(ldexp(1.0, half) / norm), true};
}

// The sum of `count` partial sums, in a fixed order, in every lane of the warp.
__device__ inline double sum_partials(const double* partials, int count) {
    double sum = 0.0;
    for (int i = thread_number() % kWarp; i < count; i += kWarp) sum += partials[i];
    return warp_reduce(sum, Add{});
}

// The input of a half step for one group: a vector, normalised as it is read.
struct Input {
    const float* data;
    float first, second;

    __device__ float scaled(float value) const { return value * first * second; }
    __device__ float operator[](int i) const { return scaled(__ldg(data + i)); }
};

// Called by a whole warp.
__device__ inline Input input_of(const HalfStepParams& p, const Gather& g, int group) {
    const std::int64_t start = static_cast<std::int64_t>(group) * g.channels * g.inputs;
    if (p.inputs == nullptr) return {p.given[g.op] + start, 1.0f, 1.0f};
    const Scale scale = inverse_norm(sum_partials(p.norms_in + g.norm_in + group * g.norms_in, g.norms_in));
    if (!scale.alive) return {p.given[g.op] + start, 1.0f, 1.0f};
    return {p.inputs + g.input + start, scale.first, scale.second};
}

// One of several parts of a sum that different blocks compute.
struct Split {
    int part, parts;
    float* partials;        // of this tile: [part][kCount][thread]
    std::int32_t* counter;  // of the parts that are done; 0 at the start
};

// Joins the parts of a split sum. Returns true in the one block that then holds the whole sum, and has to store it.
//
// Whichever block comes last adds all parts in the order of their numbers, so the bits do not depend on who that is.
template <int kCount>
__device__ bool join_splits(float (&sum)[kCount], const Split& split, std::int32_t& last) {
    if (split.parts == 1) return true;
    const int thread = thread_number();
    float* parts = split.partials + thread;
    // 1) This part to memory. What the block has written before the barrier, one thread's fence makes visible to whoever
    // sees its count; and a fence after the count makes all that was counted before visible to the block.
#pragma unroll
    for (int i = 0; i < kCount; ++i) parts[(split.part * kCount + i) * kTileThreads] = sum[i];
    __syncthreads();
    if (thread == 0) {
        __threadfence();
        last = atomicAdd(split.counter, 1) == split.parts - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return false;
    // 2) The last one reads all, from the cache that all blocks share.
    constexpr int kAtATime = kCount < 8 ? kCount : 8;  // times the unrolling: loads in flight
    [[maybe_unused]] constexpr int kUnroll = kCount < 8 ? 8 : 4;
#pragma unroll
    for (int first = 0; first < kCount; first += kAtATime) {
#pragma unroll
        for (int i = first; i < first + kAtATime; ++i) sum[i] = 0.0f;
#pragma unroll kUnroll
        for (int part = 0; part < split.parts; ++part) {
#pragma unroll
            for (int i = first; i < first + kAtATime; ++i)
                sum[i] += __ldcg(parts + (part * kCount + i) * kTileThreads);
        }
    }
    return true;
}

template <int kCount>
__device__ bool join_splits(float (&sum)[kCount], const Unit& unit, const HalfStepParams& p, std::int32_t& last) {
    if (unit.splits == 1) return true;  // there may be no partials to point into
    return join_splits(sum, Split{unit.split, unit.splits, p.partials + unit.partial, p.counters + unit.counter}, last);
}

// Adds up every thread's square sum and stores it as the tile's.
__device__ inline void store_square_sum(double square_sum, int norm, const HalfStepParams& p, double* scratch) {
    const double total = block_reduce(square_sum, Add{}, scratch);
    if (threadIdx.x == 0) p.norms_out[norm] = total;
}

__device__ inline double squared(float value) { return static_cast<double>(value) * static_cast<double>(value); }

// Coordinates of a place in a tile: its position, and the position along each axis.
struct Place {
    int position;  // -1: none
    int along[kAxes];
};

__device__ inline Place place_of(const Gather& g, const std::int32_t* table, int index) {
    int position = g.order >= 0 ? table[g.order + index] : (index < g.positions ? index : -1);
    const int inner = g.size[1] * g.size[2], rest = position < 0 ? 0 : position;
    return {position, {rest / inner, rest % inner / g.size[2], rest % g.size[2]}};
}

// One slot: where it reads relative to each place, and which tap of the kernel it multiplies with.
struct Slot {
    int along[kAxes];
    int tap;
};

__device__ inline Slot slot_of(const Gather& g, const std::int32_t* table, int slot) {
    const int inner = g.slots[1] * g.slots[2];
    Slot s{{slot / inner, slot % inner / g.slots[2], slot % g.slots[2]}, 0};
    for (int a = 0; a < kAxes; ++a) s.tap += table[g.tap[a] + s.along[a]];
    return s;
}

// Input position that a slot reads for a place, or -1.
__device__ inline int input_position(const Gather& g, const std::int32_t* table, const Place& place, const Slot& slot) {
    if (place.position < 0) return -1;
    int index = 0;
    for (int a = 0; a < kAxes; ++a) {
        const int entry = table[g.entry[a] + place.along[a] * g.slots[a] + slot.along[a]];
        if (entry < 0) return -1;
        index += entry;
    }
    return index;
}

}  // namespace sn_fast
