// Implicit-GEMM tiles: M = rows, N = positions, K = channels x slots; the input is gathered through the plan's tables.
//
// float32 runs on the ordinary units, the other precisions through matrix instructions; all share loads and layout.
#pragma once

#include "core/mma.cuh"
#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kTileRows = 64;
constexpr int kTileDepth = 16;
constexpr int kTileSlots = 64;  // slots whose positions are kept at a time

template <int kColumns>
struct GemmShared {
    // Rows are 8 elements longer than they need be: a warp's fragment loads then fall into 32 different banks.
    alignas(16) float a[2][kTileDepth][kTileRows + 8];
    alignas(16) float b[2][kTileDepth][kColumns + 8];
    std::int32_t position[kTileSlots][kColumns];  // input position of (slot, place), or -1
    std::int32_t tap[kTileSlots];                 // weight offset of a slot
    std::int32_t last;
    double scratch[kTileWarps];
};

// Runs through k = (channel, slot) in steps, without divisions.
struct Depth {
    int channel, slot;

    __device__ void advance(int channels, int rest, int slots) {
        channel += channels;
        slot += rest;
        if (slot >= slots) {
            slot -= slots;
            ++channel;
        }
    }
};

template <int kColumns>
struct GemmTile {
    static constexpr int kSums = kTileRows * kColumns / kTileThreads;
    static constexpr int kLoadsA = kTileRows * kTileDepth / kTileThreads;
    static constexpr int kLoadsB = kColumns * kTileDepth / kTileThreads;
    static constexpr int kStepA = kTileThreads / kTileDepth;  // rows between a thread's loads of A
    static constexpr int kStepB = kTileThreads / kColumns;    // depth between a thread's loads of B
    // float32: each thread holds kRowsPerThread x 4 neighbouring elements.
    static constexpr int kThreadsAcross = kColumns / 4;
    static constexpr int kRowsPerThread = kSums / 4;
    // Matrix instructions: each warp holds kMmaRows x kMmaColumns tiles of 16 x 8.
    static constexpr int kMmaRows = kColumns == 64 ? 2 : 1;
    static constexpr int kMmaColumns = kColumns == 64 ? 4 : 2;
    static constexpr int kWarpsAcross = kColumns / (8 * kMmaColumns);
    static_assert(kSums == 4 * kMmaRows * kMmaColumns && kWarpsAcross * kTileRows / (16 * kMmaRows) == kTileWarps);

    const Gather& g;
    const Unit& unit;
    const HalfStepParams& p;
    GemmShared<kColumns>& s;
    int thread;
    float sums[kSums];

    __device__ GemmTile(const Gather& g, const Unit& unit, const HalfStepParams& p, GemmShared<kColumns>& s)
        : g(g), unit(unit), p(p), s(s), thread(static_cast<int>(threadIdx.x)) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
    }

    __device__ void run() {
        const Input x = input_of(p, g, unit.group);
        const int first = p.table[g.tile_slots + 2 * unit.tile], count = p.table[g.tile_slots + 2 * unit.tile + 1];
        for (int begin = 0; begin < count; begin += kTileSlots) {
            const int slots = min(kTileSlots, count - begin);
            find_positions(p.table + first + begin, slots);
            multiply(x, slots);
        }
        if (!join_splits(sums, unit, p, s.last)) return;
        store();
    }

    // The input positions of every slot for this tile's places, and the taps.
    __device__ void find_positions(const std::int32_t* slots, int count) {
        const Place place = place_of(g, p.table, unit.tile * kColumns + thread % kColumns);
        for (int j = thread / kColumns; j < count; j += kStepB) {
            const Slot slot = slot_of(g, p.table, slots[j]);
            s.position[j][thread % kColumns] = input_position(g, p.table, place, slot);
            if (thread % kColumns == 0) s.tap[j] = slot.tap * g.tap_stride;
        }
        __syncthreads();
    }

    // kLoadsA elements of one depth of A, every kStepA rows; zero past the last row.
    template <class T>
    __device__ void load_rows(int offset, int rows, float (&a)[kLoadsA]) {
        const T* weight = static_cast<const T*>(p.weights[g.op]) + offset;
#pragma unroll
        for (int i = 0; i < kLoadsA; ++i) a[i] = i * kStepA < rows ? to_float(weight[i * kStepA * g.row_stride]) : 0.0f;
    }

    __device__ void multiply(const Input& x, int slots) {
        const int depth = (unit.channel_end - unit.channel) * slots;
        const int corner = unit.group * g.group_stride + unit.row * g.row_stride;
        // Where this thread loads: one depth of A, kLoadsA rows; one column of B, kLoadsB depths.
        const int depth_a = thread % kTileDepth, row_a = thread / kTileDepth;
        const int depth_b = thread / kColumns, column_b = thread % kColumns;
        const int rows = g.rows - unit.row - row_a;
        Depth at_a{unit.channel + depth_a / slots, depth_a % slots};
        Depth at_b{unit.channel + depth_b / slots, depth_b % slots};
        const int stride = kTileDepth / slots, stride_rest = kTileDepth % slots;
        const int step = kStepB / slots, step_rest = kStepB % slots;
        float a[kLoadsA], b[kLoadsB];

        auto load = [&](int begin) {
            const bool inside = begin + depth_a < depth;
            const int offset =
                corner + (inside ? s.tap[at_a.slot] + at_a.channel * g.channel_stride + row_a * g.row_stride : 0);
            switch (static_cast<Dtype>(g.dtype)) {
                case Dtype::kFloat32: load_rows<float>(offset, inside ? rows : 0, a); break;
                case Dtype::kFloat16: load_rows<half_t>(offset, inside ? rows : 0, a); break;
                case Dtype::kBfloat16: load_rows<bfloat16_t>(offset, inside ? rows : 0, a); break;
            }
            Depth at = at_b;
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i) {
                b[i] = 0.0f;
                if (begin + depth_b + i * kStepB < depth) {
                    const int position = s.position[at.slot][column_b];
                    if (position >= 0) b[i] = x[at.channel * g.inputs + position];
                }
                at.advance(step, step_rest, slots);
            }
            at_a.advance(stride, stride_rest, slots);
            at_b.advance(stride, stride_rest, slots);
        };
        auto stage = [&](int buffer) {
#pragma unroll
            for (int i = 0; i < kLoadsA; ++i) s.a[buffer][depth_a][row_a + i * kStepA] = a[i];
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i) s.b[buffer][depth_b + i * kStepB][column_b] = b[i];
        };

        // 1) The first chunk.
        load(0);
        stage(0);
        __syncthreads();
        int buffer = 0;
        for (int begin = kTileDepth;; begin += kTileDepth, buffer ^= 1) {
            // 2) The next chunk travels while this one is multiplied.
            const bool more = begin < depth;
            if (more) load(begin);
            multiply_chunk(buffer);
            if (!more) break;
            stage(buffer ^ 1);
            __syncthreads();
        }
        // 3) The tables and buffers are free again.
        __syncthreads();
    }

    __device__ void multiply_chunk(int buffer) {
        switch (p.precision) {
            case Precision::kFloat32: return multiply_float32(buffer);
            case Precision::kTf32: return multiply_tf32<1>(buffer);
            case Precision::kTf32x3: return multiply_tf32<2>(buffer);
            case Precision::kBfloat16: return multiply_bfloat16(buffer);
        }
    }

    __device__ void multiply_float32(int buffer) {
        const int row = thread / kThreadsAcross * kRowsPerThread, column = thread % kThreadsAcross * 4;
        float chunk[kSums] = {};  // sums of sums: the error grows as the root of depth / 16, not of depth
#pragma unroll 8
        for (int k = 0; k < kTileDepth; ++k) {
            const float4 right = *reinterpret_cast<const float4*>(&s.b[buffer][k][column]);
#pragma unroll
            for (int r = 0; r < kRowsPerThread; ++r) {
                const float left = s.a[buffer][k][row + r];
                chunk[4 * r] += left * right.x;
                chunk[4 * r + 1] += left * right.y;
                chunk[4 * r + 2] += left * right.z;
                chunk[4 * r + 3] += left * right.w;
            }
        }
#pragma unroll
        for (int i = 0; i < kSums; ++i) sums[i] += chunk[i];
    }

    __device__ int mma_row() const { return thread / kWarp / kWarpsAcross * 16 * kMmaRows + thread % kWarp / 4; }
    __device__ int mma_column() const { return thread / kWarp % kWarpsAcross * 8 * kMmaColumns; }

    // With two parts, about float32's accuracy.
    template <int kParts>
    __device__ void multiply_tf32(int buffer) {
        const int row = mma_row(), column = mma_column() + thread % kWarp / 4, t = thread % 4;
#pragma unroll 1  // both halves at once take too many registers
        for (int k = 0; k < kTileDepth; k += 8) {
            std::uint32_t a[kMmaRows][kParts][4];
#pragma unroll
            for (int m = 0; m < kMmaRows; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    split<kParts>(s.a[buffer][k + t + i / 2 * 4][row + 16 * m + i % 2 * 8], a[m], i);
#pragma unroll
            for (int n = 0; n < kMmaColumns; ++n) {
                std::uint32_t b[kParts][2];
#pragma unroll
                for (int i = 0; i < 2; ++i) split<kParts>(s.b[buffer][k + t + 4 * i][column + 8 * n], b, i);
#pragma unroll
                for (int m = 0; m < kMmaRows; ++m) {
                    float(&d)[4] = *reinterpret_cast<float(*)[4]>(&sums[(m * kMmaColumns + n) * 4]);
                    if constexpr (kParts == 2) {  // small products first; low times low is below float32's precision
                        mma_tf32(d, a[m][1], b[0]);
                        mma_tf32(d, a[m][0], b[1]);
                    }
                    mma_tf32(d, a[m][0], b[0]);
                }
            }
        }
    }

    // value = high + low, each a tf32.
    template <int kParts, int kCount>
    __device__ static void split(float value, std::uint32_t (&parts)[kParts][kCount], int i) {
        parts[0][i] = to_tf32(value);
        if constexpr (kParts == 2) parts[1][i] = to_tf32(value - bits_as_float(parts[0][i]));
    }

    __device__ void multiply_bfloat16(int buffer) {
        const int row = mma_row(), column = mma_column() + thread % kWarp / 4, k = thread % 4 * 2;
        std::uint32_t b[kMmaColumns][2];
#pragma unroll
        for (int n = 0; n < kMmaColumns; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                b[n][i] = pack_bfloat16(s.b[buffer][k + 8 * i][column + 8 * n], s.b[buffer][k + 8 * i + 1][column + 8 * n]);
#pragma unroll
        for (int m = 0; m < kMmaRows; ++m) {
            std::uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int depth = k + i / 2 * 8, r = row + 16 * m + i % 2 * 8;
                a[i] = pack_bfloat16(s.a[buffer][depth][r], s.a[buffer][depth + 1][r]);
            }
#pragma unroll
            for (int n = 0; n < kMmaColumns; ++n)
                mma_bfloat16(*reinterpret_cast<float(*)[4]>(&sums[(m * kMmaColumns + n) * 4]), a, b[n]);
        }
    }

    __device__ void store() {
        double square_sum = 0.0;
        float* out = p.outputs + g.output + (unit.group * g.rows + unit.row) * g.positions;
        const int rows = min(kTileRows, g.rows - unit.row);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
            int row, column;
            if (p.precision == Precision::kFloat32) {
                row = thread / kThreadsAcross * kRowsPerThread + i / 4;
                column = thread % kThreadsAcross * 4 + i % 4;
            } else {
                const int mma = i / 4;
                row = mma_row() + mma / kMmaColumns * 16 + i % 4 / 2 * 8;
                column = mma_column() + mma % kMmaColumns * 8 + thread % 4 * 2 + i % 2;
            }
            const int index = unit.tile * kColumns + column;
            const int position = g.order >= 0 ? p.table[g.order + index] : (index < g.positions ? index : -1);
            if (row >= rows || position < 0) continue;
            out[row * g.positions + position] = sums[i];
            square_sum += squared(sums[i]);
        }
        store_square_sum(square_sum, unit.norm, p, s.scratch);
    }
};

}  // namespace sn_fast
