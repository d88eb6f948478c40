// Implicit-GEMM tiles: M = rows, N = positions, K = channels x slots; the input is gathered through the plan's tables.
#pragma once

#include "core/copy_async.cuh"
#include "spectral/product.cuh"
#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kTileSlots = 32;  // slots whose positions are kept at a time

// Chunks in shared memory: one is multiplied while the others travel.
template <int kColumns>
constexpr int kTileStages = kColumns == 64 ? 4 : 3;

template <int kColumns>
struct GemmShared {
    union {
        StagedTiles<kColumns, kTileStages<kColumns>> tiles;
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

    __device__ int channel(int k) const {
        return static_cast<int>(__umulhi(2 * static_cast<unsigned>(k), inverse));
    }
};

// T is the type of the weights.
template <class T, int kColumns>
struct GemmTile {
    static constexpr int kDepth = kTileDepth<kColumns>;
    static constexpr int kLoadsA = kTileRows * kDepth / kTileThreads;
    static constexpr int kLoadsB = kColumns * kDepth / kTileThreads;
    static constexpr int kStep = kTileThreads / kDepth;  // rows between a thread's loads of A, and columns of B
    static constexpr int kStepSlots = kTileThreads / kColumns;
    static constexpr int kStages = kTileStages<kColumns>;
    static constexpr bool kAsync = sizeof(T) == sizeof(float);  // weights go to shared memory as they are

    const Gather& g;
    const Unit& unit;
    const HalfStepParams& p;
    GemmShared<kColumns>& s;
    Precision precision;
    int thread;
    TileProduct<kColumns> product;
    Input x{nullptr, 1.0f, 1.0f};

    __device__ GemmTile(const Gather& g, const Unit& unit, const HalfStepParams& p, Precision precision,
                        GemmShared<kColumns>& s)
        : g(g), unit(unit), p(p), s(s), precision(precision), thread(thread_number()), product(precision, thread) {}

    __device__ void run() {
        for (int begin = 0; begin < unit.n_slots; begin += kTileSlots) {
            const int slots = min(kTileSlots, unit.n_slots - begin);
            if (thread < slots) s.slots[thread] = slots_at(p.table, unit.slots)[begin + thread];
            __syncthreads();
            multiply(slots);
        }
        if (scales_sums()) {
#pragma unroll
            for (float& sum : product.sums) sum = x.scaled(sum);
        }
        if (!join_splits(product.sums, unit, p, s.last)) return;
        store();
    }

    // Whether the sums are divided by the input's norm, not the input. What is rounded to few bits is divided before.
    __device__ bool scales_sums() const {
        return (precision == Precision::kFloat32 || precision == Precision::kTf32x3) && x.may_wait();
    }

    // The input positions of every slot for this tile's places.
    __device__ void find_positions(int slots) {
        const Place place = place_of(g, p.table, unit.tile * kColumns + thread % kColumns);
#pragma unroll 3
        for (int j = thread / kColumns; j < slots; j += kStepSlots)
            s.position[j * kColumns + thread % kColumns] = input_position(p.table, place, s.slots[j]);
    }

    __device__ void multiply(int slots) {
        const int depth = (unit.channel_end - unit.channel) * slots, chunks = (depth + kDepth - 1) / kDepth;
        // Read once, not in every chunk.
        const int row_stride = g.row_stride, channel_stride = g.channel_stride, inputs = g.inputs;
        const T* weight = as_it_is(static_cast<const T*>(p.weights[g.op]) + unit.group * g.group_stride +
                                   unit.row * row_stride + unit.channel * channel_stride);
        // What this thread loads of a chunk: one depth of it, kLoadsA rows of A and kLoadsB columns of B.
        const auto number = static_cast<unsigned>(thread);  // divided by powers of 2, which is cheaper without a sign
        const int depth_a = number % kDepth, row_a = number / kDepth, last_row = g.rows - unit.row - 1;
        const int depth_b = number / kStep, column_b = number % kStep;
        const Depth split(slots);

        // Past the end of k, A and B are zero; rows past the last repeat it, and are never stored.
        auto load_weights = [&](int chunk, int stage) {
            const int k = chunk * kDepth + depth_a, channel = split.channel(k);
            const bool inside = k < depth;
            const int corner = inside ? s.slots[k - channel * slots].weight + channel * channel_stride : 0;
            const T* from = as_it_is(weight + corner);
            float(&to)[kTileRows + 8] = s.tiles.a[stage][depth_a];
            auto place = [&](int i) { return swizzled(row_a + i * kStep % 8, depth_a) + i * kStep / 8 * 8; };
            [[maybe_unused]] T a[kLoadsA];
#pragma unroll
            for (int i = 0; i < kLoadsA; ++i) {
                const T* at = from + min(row_a + i * kStep, last_row) * row_stride;
                if constexpr (kAsync) {
                    copy_async(&to[place(i)], at, inside);
                } else {
                    a[i] = inside ? __ldg(at) : from_float<T>(0.0f);
                }
            }
            if constexpr (!kAsync) {  // waits for them: a block alone is slow, three hide it
#pragma unroll
                for (int i = 0; i < kLoadsA; ++i) to[place(i)] = to_float(a[i]);
            }
        };

        // 1) Weights of the first chunks, which depend on nothing that was computed before.
#pragma unroll 1
        for (int chunk = 0; chunk < min(kStages - 1, chunks); ++chunk) load_weights(chunk, chunk);
        // 2) Where the input is read, and the input itself once the launch before has ended.
        find_positions(slots);
        x = input_of(p, g, unit.group);
        const float* data = as_it_is(x.data + unit.channel * inputs);
        auto load_input = [&](int chunk, int stage) {
            const int k = chunk * kDepth + depth_b, channel = split.channel(k);
            const bool inside = k < depth;
            const std::int32_t* row = s.position + (inside ? (k - channel * slots) * kColumns + column_b : 0);
            const float* from = as_it_is(data + channel * inputs);
            float(&to)[kColumns + 8] = s.tiles.b[stage][depth_b];
            int positions[kLoadsB];  // all read before the first copy: a copy is a barrier to the compiler
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i) positions[i] = row[i * kStep];
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i)
                copy_async(&to[column_b + i * kStep], from + positions[i], inside && positions[i] >= 0);
        };
        __syncthreads();
#pragma unroll 1
        for (int chunk = 0; chunk < kStages - 1; ++chunk) {
            if (chunk < chunks) load_input(chunk, chunk);
            end_copy_group();
        }
        // 3) Chunk after chunk. While one is multiplied later ones travel.
        int stage = 0;
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk) {
            wait_for_copies<kStages - 2>();
            if (!scales_sums()) {  // this thread's own copies
                for (int i = 0; i < kLoadsB; ++i) {
                    float& value = s.tiles.b[stage][depth_b][column_b + i * kStep];
                    value = x.scaled(value);
                }
            }
            __syncthreads();
            const int ahead = chunk + kStages - 1, free = stage == 0 ? kStages - 1 : stage - 1;
            if (ahead < chunks) {
                load_weights(ahead, free);
                load_input(ahead, free);
            }
            end_copy_group();
            product.add(s.tiles.a[stage], s.tiles.b[stage]);
            stage = stage + 1 == kStages ? 0 : stage + 1;
        }
        // 4) The tables and buffers are free again.
        __syncthreads();
    }

    // The tile by way of shared memory, so that neighbouring threads store neighbouring positions.
    __device__ void store() {
        constexpr int kStepRows = kTileThreads / kColumns;
        // 1) The sums, from wherever the product left them.
#pragma unroll
        for (int i = 0; i < TileProduct<kColumns>::kSums; ++i)
            s.result[product.row(i)][product.column(i)] = product.sums[i];
        __syncthreads();
        // 2) A column per thread.
        const int column = thread % kColumns, index = unit.tile * kColumns + column;
        const int position = g.order >= 0 ? p.table[g.order + index] : (index < g.positions ? index : -1);
        const int positions = g.positions, rows = position >= 0 ? min(kTileRows, g.rows - unit.row) : 0;
        float* out = p.outputs + g.output + (unit.group * g.rows + unit.row) * positions + position;
        double square_sum = 0.0;
#pragma unroll 4
        for (int row = thread / kColumns; row < rows; row += kStepRows) {
            const float value = s.result[row][column];
            out[row * positions] = value;
            square_sum += squared(value);
        }
        store_square_sum(square_sum, unit.norm, p, s.scratch);
    }
};

}  // namespace sn_fast
