// Tiles of a matrix times a vector: memory-bound, so every weight is read once, 16 bytes at a time where it is aligned.
#pragma once

#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kDotRows = 4;                           // rows of one warp
constexpr int kDotTile = kDotRows * kTileWarps;       // rows of one tile
constexpr int kDotChunk = 1024;                       // elements of the vector kept in shared memory
constexpr int kAxpyLanes = 8;                         // lanes side by side; each holds 16 bytes of a row
constexpr int kAxpyRows = kTileThreads / kAxpyLanes;  // rows in flight side by side

struct MatrixShared {
    alignas(16) float x[kDotChunk];
    float columns[kAxpyRows][kAxpyLanes * Pack<half_t>::kCount];
    float values[kDotTile];
    std::int32_t last;
    double scratch[kTileWarps];
};

// Rows item.row .. + 15 of y = W x; rows contiguous (channel_stride 1).
template <class T>
__device__ void dot_tile(const OperatorMap& g, const WorkItem& item, const T* weight, const HalfStepParams& p,
                         MatrixShared& s) {
    constexpr int kVector = Pack<T>::kCount;
    const int thread = opaque_thread_index(), lane = thread % kWarp, warp = thread / kWarp;
    const Input x = input_of(p, g, item.group);
    const int row = item.row + warp * kDotRows;
    const T* rows[kDotRows];
    bool vectors = true;
    for (int r = 0; r < kDotRows; ++r) {
        rows[r] = weight + min(row + r, g.rows - 1) * g.row_stride;  // a row past the end repeats the last, unused
        vectors = vectors && is_aligned(rows[r] + item.channel);
    }
    float sums[kDotRows] = {};
    for (int chunk = item.channel; chunk < item.channel_end; chunk += kDotChunk) {
        const int length = min(kDotChunk, item.channel_end - chunk);
        // 1) A chunk of the normalised vector to shared memory.
        for (int i = thread; i < length; i += kTileThreads) s.x[i] = x[chunk + i];
        __syncthreads();
        // 2) Every warp multiplies its rows with it.
        const int whole = vectors ? length / kVector * kVector : 0;
#pragma unroll 2
        for (int i = lane * kVector; i < whole; i += kWarp * kVector) {
            Pack<T> w[kDotRows];
#pragma unroll
            for (int r = 0; r < kDotRows; ++r) w[r] = *reinterpret_cast<const Pack<T>*>(rows[r] + chunk + i);
#pragma unroll
            for (int e = 0; e < kVector; ++e) {
                const float value = s.x[i + e];
#pragma unroll
                for (int r = 0; r < kDotRows; ++r) sums[r] += to_float(w[r].values[e]) * value;
            }
        }
        for (int i = whole + lane; i < length; i += kWarp) {
            for (int r = 0; r < kDotRows; ++r) sums[r] += to_float(rows[r][chunk + i]) * s.x[i];
        }
        __syncthreads();
    }
    // 3) One value per row, then per thread.
    for (int r = 0; r < kDotRows; ++r) {
        const float sum = warp_reduce(sums[r], Add{});
        if (lane == 0) s.values[warp * kDotRows + r] = sum;
    }
    __syncthreads();
    float value[1] = {thread < kDotTile ? s.values[thread] : 0.0f};
    if (!join_splits(value, item, p, s.last)) return;
    const bool mine = thread < kDotTile && item.row + thread < g.rows;
    if (mine) p.outputs[g.output + item.group * g.rows + item.row + thread] = value[0];
    store_square_sum(mine ? squared(value[0]) : 0.0, item.norm, p, s.scratch);
}

// Elements item.row .. of y = sum_c W[., c] x[c]; columns contiguous (row_stride 1).
template <class T>
__device__ void axpy_tile(const OperatorMap& g, const WorkItem& item, const T* weight, const HalfStepParams& p,
                          MatrixShared& s) {
    constexpr int kVector = Pack<T>::kCount, kColumns = kAxpyLanes * kVector, kUnroll = 4;
    const int thread = opaque_thread_index(), lane = thread % kAxpyLanes, first = thread / kAxpyLanes;
    const Input x = input_of(p, g, item.group);
    const int column = item.row + lane * kVector;
    const int count = min(kVector, g.rows - column);
    const T* at = weight + column;
    const bool vectors = count == kVector && is_aligned(at) && g.channel_stride % kVector == 0;
    float sums[kVector] = {};
    int c = item.channel + first;
    // 1) Every thread adds its columns of every 16th row, several rows in flight.
    if (vectors) {
        for (; c + (kUnroll - 1) * kAxpyRows < item.channel_end; c += kUnroll * kAxpyRows) {
            Pack<T> w[kUnroll];
            float value[kUnroll];
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
                w[i] = *reinterpret_cast<const Pack<T>*>(at + (c + i * kAxpyRows) * g.channel_stride);
                value[i] = x[c + i * kAxpyRows];
            }
#pragma unroll
            for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
                for (int e = 0; e < kVector; ++e) sums[e] += to_float(w[i].values[e]) * value[i];
            }
        }
    }
    for (; c < item.channel_end; c += kAxpyRows) {
        const float value = x[c];
#pragma unroll
        for (int e = 0; e < kVector; ++e)
            if (e < count) sums[e] += to_float(at[c * g.channel_stride + e]) * value;
    }
    // 2) The rows' sums, in order.
    for (int e = 0; e < kVector; ++e) s.columns[first][lane * kVector + e] = sums[e];
    __syncthreads();
    float value[1] = {0.0f};
    if (thread < kColumns)
        for (int r = 0; r < kAxpyRows; ++r) value[0] += s.columns[r][thread];
    if (!join_splits(value, item, p, s.last)) return;
    const bool mine = thread < kColumns && item.row + thread < g.rows;
    if (mine) p.outputs[g.output + item.group * g.rows + item.row + thread] = value[0];
    store_square_sum(mine ? squared(value[0]) : 0.0, item.norm, p, s.scratch);
}

}  // namespace sn_fast
