// Sums and maxima over a warp or a block, in a fixed order: the same bits on every run.
#pragma once

#include "core/numeric.cuh"

namespace sn_fast {

constexpr unsigned kAllLanes = 0xffffffffu;

struct Add {
    template <class T>
    __device__ T operator()(T a, T b) const {
        return a + b;
    }
};

// NaN-ignoring, like fmaxf.
struct Max {
    __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// The combination over all lanes of a warp, in every lane. All lanes must take part.
template <class T, class Op>
__device__ T warp_reduce(T value, Op op) {
    for (int step = kWarp / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(kAllLanes, value, step));
    return value;
}

// The combination over all threads of a block (a multiple of 32, at most 1024), in every thread. `scratch` holds one
// element per warp; it may be used again after the call.
template <class T, class Op>
__device__ T block_reduce(T value, Op op, T* scratch) {
    const int thread = opaque_thread_index(), lane = thread % kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
    // 1) Within each warp.
    value = warp_reduce(value, op);
    // 2) One value per warp to shared memory.
    if (lane == 0) scratch[thread / kWarp] = value;
    __syncthreads();
    // 3) Every thread combines them in the same order.
    value = scratch[0];
    for (int w = 1; w < warps; ++w) value = op(value, scratch[w]);
    __syncthreads();
    return value;
}

// The same for a few values at a time, between one pair of barriers: their exchanges overlap. `scratch` holds kCount
// elements per warp.
template <class T, int kCount, class Op>
__device__ void block_reduce(T (&values)[kCount], Op op, T* scratch) {
    const int thread = opaque_thread_index(), lane = thread % kWarp, warps = static_cast<int>(blockDim.x) / kWarp;
    // 1) Within each warp.
    for (int step = kWarp / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = op(values[i], __shfl_xor_sync(kAllLanes, values[i], step));
    }
    // 2) kCount values per warp to shared memory.
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) scratch[thread / kWarp * kCount + i] = values[i];
    }
    __syncthreads();
    // 3) Every thread combines them in the same order.
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = scratch[i];
    for (int w = 1; w < warps; ++w) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[i] = op(values[i], scratch[w * kCount + i]);
    }
    __syncthreads();
}

}  // namespace sn_fast
