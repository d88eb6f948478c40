// Implicit-GEMM tiles: M = rows, N = positions, K = channels x slots; the input is gathered through the plan's tables.
#pragma once

#include "core/copy_async.cuh"
#include "spectral/product.cuh"
#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kTileSlots = 64;    // slots whose positions are kept at a time
constexpr int kWeightStages = 4;  // chunks of float32 weights in shared memory, all but one of them under way; 2^n

template <int kColumns>
struct GemmShared {
    union {
        StagedTiles<kColumns, kWeightStages> tiles;
        float result[kTileRows][kColumns + 1];
    };
    std::int32_t position[kTileSlots * kColumns];  // input position of (slot, place), or -1
    Slot slots[kTileSlots];
    std::int32_t last;
    double scratch[kTileWarps];
};

// Takes k = channel * slots + slot apart by a multiplication. All k are given doubled, so that the inverse of 1 fits.
struct Depth {
    unsigned inverse;  // 2^31 / slots, rounded up: exact as long as k * slots < 2^31, to which ops/layout.py keeps

    __device__ explicit Depth(int slots)
        : inverse((0x80000000u + static_cast<unsigned>(slots) - 1) / static_cast<unsigned>(slots)) {}

    __device__ int channel(int k) const { return static_cast<int>(__umulhi(2 * static_cast<unsigned>(k), inverse)); }
};

// T is the type of the weights.
template <class T, int kColumns>
struct GemmTile {
    static constexpr int kDepth = kTileDepth<kColumns>;
    static constexpr int kLoadsA = kTileRows * kDepth / kTileThreads;
    static constexpr int kLoadsB = kColumns * kDepth / kTileThreads;
    static constexpr int kStepA = kTileThreads / kDepth;  // rows between a thread's loads of A
    static constexpr int kStepB = kTileThreads / kDepth;  // columns between a thread's loads of B
    static constexpr int kStepSlots = kTileThreads / kColumns;
    static constexpr bool kAsync = sizeof(T) == sizeof(float);  // weights go to shared memory as they are

    const OperatorMap& g;
    const WorkItem& item;
    const HalfStepParams& p;
    GemmShared<kColumns>& s;
    int thread;
    TileProduct<kColumns> product;

    __device__ GemmTile(const OperatorMap& g, const WorkItem& item, const HalfStepParams& p, Precision precision,
                        GemmShared<kColumns>& s)
        : g(g), item(item), p(p), s(s), thread(opaque_thread_index()), product(precision, thread) {}

    __device__ void run() {
        for (int begin = 0; begin < item.n_slots; begin += kTileSlots) {
            const int slots = min(kTileSlots, item.n_slots - begin);
            if (thread < slots) s.slots[thread] = slots_at(p.table, item.slots)[begin + thread];
            __syncthreads();
            multiply(slots);
        }
        if (!join_splits(product.sums, item, p, s.last)) return;
        store();
    }

    // The input positions of every slot for this tile's places.
    __device__ void find_positions(int slots) {
        const Place place = place_of(g, p.table, item.tile * kColumns + thread % kColumns);
#pragma unroll 3
        for (int j = thread / kColumns; j < slots; j += kStepSlots)
            s.position[j * kColumns + thread % kColumns] = input_position(p.table, place, s.slots[j]);
    }

    __device__ void multiply(int slots) {
        const int depth = (item.channel_end - item.channel) * slots, chunks = (depth + kDepth - 1) / kDepth;
        // Read once, not in every chunk.
        const int row_stride = g.row_stride, channel_stride = g.channel_stride, inputs = g.inputs;
        const T* weight = opaque(static_cast<const T*>(p.weights[g.op]) + item.group * g.group_stride +
                                 item.row * row_stride + item.channel * channel_stride);
        // What this thread loads of a chunk: one depth of it, kLoadsA rows of A and kLoadsB columns of B.
        const auto number = static_cast<unsigned>(thread);  // divided by powers of 2, which is cheaper without a sign
        const int depth_a = number % kDepth, row_a = number / kDepth, last_row = g.rows - item.row - 1;
        const int depth_b = number / kStepB, column_b = number % kStepB;
        const Depth split(slots);
        float b[kLoadsB];

        // Past the end of k, A is zero and B anything that was read before; rows past the last repeat it, and are never
        // stored.
        auto load_weights = [&](int chunk) {
            const int k = chunk * kDepth + depth_a, channel = split.channel(k);
            const bool inside = k < depth;
            const int corner = inside ? s.slots[k - channel * slots].weight + channel * channel_stride : 0;
            const T* from = opaque(weight + corner);
            float (&to)[kTileRows + 8] = s.tiles.a[chunk & (kWeightStages - 1)][depth_a];
            auto place = [&](int i) { return swizzled(row_a + i * kStepA % 8, depth_a) + i * kStepA / 8 * 8; };
            [[maybe_unused]] T a[kLoadsA];
#pragma unroll
            for (int i = 0; i < kLoadsA; ++i) {
                const T* at = from + min(row_a + i * kStepA, last_row) * row_stride;
                if constexpr (kAsync) {
                    copy_async(&to[place(i)], at, inside);
                } else {
                    a[i] = inside ? __ldg(at) : from_float<T>(0.0f);
                }
            }
            if constexpr (!kAsync) {
#pragma unroll
                for (int i = 0; i < kLoadsA; ++i) to[place(i)] = to_float(a[i]);
            }
        };

        // 1) Weights of the first chunks, which depend on nothing that was computed before.
#pragma unroll 1
        for (int chunk = 0; kAsync && chunk < kWeightStages - 1; ++chunk) {
            if (chunk < chunks) load_weights(chunk);
            end_copy_group();
        }
        // 2) Where the input is read, and the input itself once the launch before has ended.
        find_positions(slots);
        const Input x = input_of(p, g, item.group);
        const float* data = opaque(x.data + item.channel * inputs);
        auto load_input = [&](int chunk) {
            const int k = min(chunk * kDepth + depth_b, depth - 1), channel = split.channel(k);
            const std::int32_t* row = s.position + ((k - channel * slots) * kColumns + column_b);
            const float* from = opaque(data + channel * inputs);
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i) {
                const int position = row[i * kStepB];
                b[i] = position >= 0 ? __ldg(from + position) : 0.0f;
            }
        };
        auto stage_input = [&](int chunk) {
            float (&to)[kColumns + 8] = s.tiles.b[chunk & 1][depth_b];
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i) to[column_b + i * kStepB] = x.scaled(b[i]);
        };
        __syncthreads();
        // 3) Chunk after chunk. While one is multiplied the next one's input and the weights of later ones travel. All
        //    loads are under way before the first of them is used.
#pragma unroll 1
        for (int chunk = -1;; ++chunk) {
            if (chunk >= 0) {
                wait_for_copies<kWeightStages - 2>();
                __syncthreads();
            }
            const bool more = chunk + 1 < chunks;
            const int ahead = chunk + kWeightStages - 1;
            if (kAsync && chunk >= 0 && ahead < chunks) load_weights(ahead);
            if (chunk >= 0) end_copy_group();
            if (more) load_input(chunk + 1);
            if (chunk >= 0) product.add(s.tiles.a[chunk & (kWeightStages - 1)], s.tiles.b[chunk & 1]);
            if (!more) break;
            if (!kAsync) load_weights(chunk + 1);  // it waits for them: a block alone is slow, three hide it
            stage_input(chunk + 1);
        }
        // 4) The tables and buffers are free again.
        __syncthreads();
    }

    // The tile by way of shared memory, so that neighbouring threads store neighbouring positions.
    __device__ void store() {
        constexpr int kStep = kTileThreads / kColumns;
        // 1) The sums, from wherever the product left them.
#pragma unroll
        for (int i = 0; i < TileProduct<kColumns>::kSums; ++i)
            s.result[product.row(i)][product.column(i)] = product.sums[i];
        __syncthreads();
        // 2) A column per thread.
        const int column = thread % kColumns, index = item.tile * kColumns + column;
        const int position = g.order >= 0 ? p.table[g.order + index] : (index < g.positions ? index : -1);
        const int positions = g.positions, rows = position >= 0 ? min(kTileRows, g.rows - item.row) : 0;
        float* out = p.outputs + g.output + (item.group * g.rows + item.row) * positions + position;
        double square_sum = 0.0;
#pragma unroll 4
        for (int row = thread / kColumns; row < rows; row += kStep) {
            const float value = s.result[row][column];
            out[row * positions] = value;
            square_sum += squared(value);
        }
        store_square_sum(square_sum, item.norm, p, s.scratch);
    }
};

}  // namespace sn_fast
