// The product of two staged tiles, 64 rows x kColumns columns, in registers of 128 threads.
#pragma once

#include "core/mma.cuh"
#include "core/reduce.cuh"
#include "spectral/half_step.h"

namespace sn_fast {

constexpr int kTileThreads = 128;
constexpr int kTileWarps = kTileThreads / kWarp;
constexpr int kTileRows = 64;

// How deep staged tiles are. A narrow one does little with each weight, so that its time is that of loading them: it
// has twice as many under way.
template <int kColumns>
constexpr int kTileDepth = kColumns == 64 ? 16 : 32;

// Buffers: some are filled while another is multiplied. Rows are 8 elements longer than they need be, and in `a` the
// elements of a row are exchanged by `swizzled`: then neither a warp that stores 16 depths of two rows nor one that loads
// fragments of tf32 meets a bank of shared memory twice (one that stores 32 depths of a row does).
template <int kColumns, int kBuffersA = 2>
struct StagedTiles {
    alignas(16) float a[kBuffersA][kTileDepth<kColumns>][kTileRows + 8];
    alignas(16) float b[2][kTileDepth<kColumns>][kColumns + 8];
};

// Where row `row` of one depth of `a` is kept: within its 8.
__device__ inline int swizzled(int row, int depth) { return row ^ (depth >> 2 & 3) * 2; }

template <int kColumns>
struct TileProduct {
    static constexpr int kDepth = kTileDepth<kColumns>;
    static constexpr int kSums = kTileRows * kColumns / kTileThreads;
    // float32: each thread holds kRowsPerThread x 4 neighbouring elements.
    static constexpr int kThreadsAcross = kColumns / 4;
    static constexpr int kRowsPerThread = kSums / 4;
    // Matrix instructions: each warp holds kMmaRows x kMmaColumns tiles of 16 x 8.
    static constexpr int kMmaRows = kColumns == 64 ? 2 : 1;
    static constexpr int kMmaColumns = kColumns == 64 ? 4 : 2;
    static constexpr int kWarpsAcross = kColumns / (8 * kMmaColumns);
    static_assert(kSums == 4 * kMmaRows * kMmaColumns && kWarpsAcross * kTileRows / (16 * kMmaRows) == kTileWarps);

    Precision precision;
    int thread;
    float sums[kSums];

    __device__ TileProduct(Precision precision, int thread) : precision(precision), thread(thread) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    }

    // Where sums[i] stands in the tile.
    __device__ int row(int i) const {
        if (precision == Precision::kFloat32) return thread / kThreadsAcross * kRowsPerThread + i / 4;
        return mma_row() + i / 4 / kMmaColumns * 16 + i % 4 / 2 * 8;
    }
    __device__ int column(int i) const {
        if (precision == Precision::kFloat32) return thread % kThreadsAcross * 4 + i % 4;
        return mma_column() + i / 4 % kMmaColumns * 8 + thread % 4 * 2 + i % 2;
    }

    using Left = float[kDepth][kTileRows + 8];
    using Right = float[kDepth][kColumns + 8];

    // sums += the product of one pair of staged tiles.
    __device__ void add(const Left& a, const Right& b) {
        switch (precision) {
            case Precision::kFloat32: return add_float32(a, b);
            case Precision::kTf32: return add_tf32<1>(a, b);
            case Precision::kTf32x3: return add_tf32<2>(a, b);
            case Precision::kBfloat16: return add_bfloat16(a, b);
        }
    }

private:
    __device__ void add_float32(const Left& a, const Right& b) {
        const int row = thread / kThreadsAcross * kRowsPerThread, column = thread % kThreadsAcross * 4;
        float chunk[kSums] = {};  // sums of 16 products: the error grows as the root of depth / 16, not of depth
#pragma unroll 1                  // all at once take too many registers
        for (int first = 0; first < kDepth; first += 8) {
            const int swapped = swizzled(row, first);
#pragma unroll
            for (int k = 0; k < 8; ++k) {
                const float4 right = *reinterpret_cast<const float4*>(&b[first + k][column]);
                float left[kRowsPerThread];
                load_rows(a[first + k], swapped, k, left);
#pragma unroll
                for (int r = 0; r < kRowsPerThread; ++r) {
                    chunk[4 * r] += left[r] * right.x;
                    chunk[4 * r + 1] += left[r] * right.y;
                    chunk[4 * r + 2] += left[r] * right.z;
                    chunk[4 * r + 3] += left[r] * right.w;
                }
            }
            if (first % 16 == 0) continue;
#pragma unroll
            for (int i = 0; i < kSums; ++i) {
                sums[i] += chunk[i];
                chunk[i] = 0.0f;
            }
        }
    }

    // Rows of depth k < 8 from `row` on, 8 or 2: swizzled, they are the same ones in another order.
    __device__ static void load_rows(const float (&a)[kTileRows + 8], int row, int k, float (&rows)[8]) {
        const float4 low = *reinterpret_cast<const float4*>(&a[row]);
        const float4 high = *reinterpret_cast<const float4*>(&a[row ^ 4]);
        const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int r = 0; r < 8; ++r) rows[r] = values[swizzled(r, k)];
    }
    __device__ static void load_rows(const float (&a)[kTileRows + 8], int row, int k, float (&rows)[2]) {
        const float2 pair = *reinterpret_cast<const float2*>(&a[swizzled(row, k)]);
        rows[0] = pair.x, rows[1] = pair.y;
    }

    __device__ int mma_row() const { return thread / kWarp / kWarpsAcross * 16 * kMmaRows + thread % kWarp / 4; }
    __device__ int mma_column() const { return thread / kWarp % kWarpsAcross * 8 * kMmaColumns; }

    // With two parts, about float32's accuracy.
    template <int kParts>
    __device__ void add_tf32(const Left& left, const Right& right) {
        const int row = mma_row(), column = mma_column() + thread % kWarp / 4, t = thread % 4;
#pragma unroll 1  // both halves at once take too many registers
        for (int k = 0; k < kDepth; k += 8) {
            std::uint32_t a[kMmaRows][kParts][4];
#pragma unroll
            for (int m = 0; m < kMmaRows; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int depth = k + i / 2 * 4;  // plus t < 4
                    split<kParts>(left[depth + t][swizzled(row + 16 * m + i % 2 * 8, depth)], a[m], i);
                }
#pragma unroll
            for (int n = 0; n < kMmaColumns; ++n) {
                std::uint32_t b[kParts][2];
#pragma unroll
                for (int i = 0; i < 2; ++i) split<kParts>(right[k + t + 4 * i][column + 8 * n], b, i);
#pragma unroll
                for (int m = 0; m < kMmaRows; ++m) {
                    float (&sum)[4] = fragment(m, n);
                    if constexpr (kParts == 1) {
                        mma_tf32(sum, a[m][0], b[0]);
                    } else {  // sums of sums, small products first; low times low is below float32's precision
                        float d[4] = {};
                        mma_tf32(d, a[m][1], b[0]);
                        mma_tf32(d, a[m][0], b[1]);
                        mma_tf32(d, a[m][0], b[0]);
#pragma unroll
                        for (int i = 0; i < 4; ++i) sum[i] += d[i];
                    }
                }
            }
        }
    }

    // value = high + low, each a tf32.
    template <int kParts, int kCount>
    __device__ static void split(float value, std::uint32_t (&parts)[kParts][kCount], int i) {
        parts[0][i] = kParts == 1 ? tf32_operand(value) : to_tf32(value);
        if constexpr (kParts == 2) parts[1][i] = tf32_operand(value - bits_as_float(parts[0][i]));
    }

    __device__ void add_bfloat16(const Left& left, const Right& right) {
        const int row = mma_row(), column = mma_column() + thread % kWarp / 4;
#pragma unroll 1
        for (int k = thread % 4 * 2; k < kDepth; k += 16) {
            std::uint32_t b[kMmaColumns][2];
#pragma unroll
            for (int n = 0; n < kMmaColumns; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                    b[n][i] = pack_bfloat16(right[k + 8 * i][column + 8 * n], right[k + 8 * i + 1][column + 8 * n]);
#pragma unroll
            for (int m = 0; m < kMmaRows; ++m) {
                std::uint32_t a[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int depth = k + i / 2 * 8, r = row + 16 * m + i % 2 * 8;
                    a[i] = pack_bfloat16(left[depth][swizzled(r, depth)], left[depth + 1][swizzled(r, depth + 1)]);
                }
#pragma unroll
                for (int n = 0; n < kMmaColumns; ++n) mma_bfloat16(fragment(m, n), a, b[n]);
            }
        }
    }

    __device__ float (&fragment(int m, int n))[4] {
        return *reinterpret_cast<float (*)[4]>(&sums[(m * kMmaColumns + n) * 4]);
    }
};

}  // namespace sn_fast
