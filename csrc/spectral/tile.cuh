// What all kinds of tiles share: the scaled input vector, the joining of split sums, and the result's square sum.
#pragma once

#include <type_traits>

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
    for (int i = opaque_thread_index() % kWarp; i < count; i += kWarp) sum += partials[i];
    return warp_reduce(sum, Add{});
}

// The input of a half step for one group: a vector, normalised as it is read.
struct Input {
    const float* data;
    float first, second;

    __device__ float scaled(float value) const { return value * first * second; }
    __device__ float operator[](int i) const { return scaled(__ldg(data + i)); }
};

// Called by a whole warp, when the launch before may still run.
__device__ inline Input input_of(const HalfStepParams& p, const OperatorMap& g, int group) {
    wait_for_previous();
    const std::int64_t start = static_cast<std::int64_t>(group) * g.channels * g.inputs;
    if (p.inputs == nullptr) return {p.given[g.op] + start, 1.0f, 1.0f};
    const Scale scale = inverse_norm(sum_partials(p.norms_in + g.norm_in + group * g.norms_in, g.norms_in));
    if (!scale.alive) return {p.given[g.op] + start, 1.0f, 1.0f};
    return {p.inputs + g.input + start, scale.first, scale.second};
}

template <class T>
__device__ T packed(const float* values);

template <>
__device__ inline float packed<float>(const float* values) {
    return values[0];
}

template <>
__device__ inline float4 packed<float4>(const float* values) {
    return make_float4(values[0], values[1], values[2], values[3]);
}

__device__ inline void add_to(float* sums, float value) { sums[0] += value; }

__device__ inline void add_to(float* sums, const float4& values) {
    sums[0] += values.x, sums[1] += values.y, sums[2] += values.z, sums[3] += values.w;
}

// One of several parts of a sum that different blocks compute.
struct Split {
    int part, parts;
    float* partials;        // of this tile: [part][kCount / 4][thread][4], or [part][thread]
    std::int32_t* counter;  // of the parts that are done; 0 at the start
};

// Joins the parts of a split sum. Returns true in the one block that then holds the whole sum, and has to store it.
//
// Whichever block comes last adds all parts in the order of their numbers, so the bits do not depend on who that is.
template <int kCount>
__device__ bool join_splits(float (&sum)[kCount], const Split& split, std::int32_t& last) {
    if (split.parts == 1) return true;
    using Several = typename std::conditional<kCount % 4 == 0, float4, float>::type;
    constexpr int kEach = sizeof(Several) / sizeof(float), kLoads = kCount / kEach;
    const int thread = opaque_thread_index();
    Several* parts = reinterpret_cast<Several*>(split.partials) + thread;
    // 1) This part to memory. One thread's fence makes what the block wrote before the barrier visible to whoever sees
    // its count, and its fence after the count makes all that was counted before visible to the block.
    Several* mine = parts + split.part * (kLoads * kTileThreads);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) mine[i * kTileThreads] = packed<Several>(sum + i * kEach);
    __syncthreads();
    if (thread == 0) {
        __threadfence();
        last = atomicAdd(split.counter, 1) == split.parts - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return false;
    // 2) The last one reads all, from the cache that all blocks share.
    [[maybe_unused]] constexpr int kUnroll = kLoads < 8 ? 8 : 2;  // parts whose loads are under way together
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum[i] = 0.0f;
#pragma unroll kUnroll
    for (int part = 0; part < split.parts; ++part) {
        const Several* at = parts + part * (kLoads * kTileThreads);
        Several values[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) values[i] = __ldcg(at + i * kTileThreads);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) add_to(sum + i * kEach, values[i]);
    }
    return true;
}

template <int kCount>
__device__ bool join_splits(float (&sum)[kCount], const WorkItem& item, const HalfStepParams& p, std::int32_t& last) {
    if (item.splits == 1) return true;  // there may be no partials to point into
    return join_splits(sum, Split{item.split, item.splits, p.partials + item.partial, p.counters + item.counter}, last);
}

// Adds up every thread's square sum and stores it as the tile's.
__device__ inline void store_square_sum(double square_sum, int norm, const HalfStepParams& p, double* scratch) {
    const double total = block_reduce(square_sum, Add{}, scratch);
    if (threadIdx.x == 0) p.norms_out[norm] = total;
}

__device__ inline double squared(float value) { return static_cast<double>(value) * static_cast<double>(value); }

// A place in a tile: its position, and where the table holds what it reads along each axis.
struct Place {
    int position;  // -1: none
    int row[kAxes];
};

__device__ inline Place place_of(const OperatorMap& g, const std::int32_t* table, int index) {
    const int position = g.order >= 0 ? table[g.order + index] : (index < g.positions ? index : -1);
    const int some = position < 0 ? 0 : position, line = some / g.size[2], plane = line / g.size[1];
    return {position,
            {g.entry[0] + plane * g.slots[0], g.entry[1] + (line - plane * g.size[1]) * g.slots[1],
             g.entry[2] + (some - line * g.size[2]) * g.slots[2]}};
}

// The Slots that start in the table at `first`.
__device__ inline const Slot* slots_at(const std::int32_t* table, int first) {
    return reinterpret_cast<const Slot*>(table + first);
}

// Input position that a slot reads for a place, or -1. All axes are looked up at once.
__device__ inline int input_position(const std::int32_t* table, const Place& place, const Slot& slot) {
    const int e0 = __ldg(table + (place.row[0] + slot.along[0]));
    const int e1 = __ldg(table + (place.row[1] + slot.along[1]));
    const int e2 = __ldg(table + (place.row[2] + slot.along[2]));
    return (place.position | e0 | e1 | e2) >= 0 ? e0 + e1 + e2 : -1;
}

}  // namespace sn_fast
