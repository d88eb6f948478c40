// Implicit-GEMM tiles: M = rows, N = positions, K = channels x slots; the input is gathered through the plan's tables.
#pragma once

#include "spectral/product.cuh"
#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kTileSlots = 64;  // slots whose positions are kept at a time

template <int kColumns>
struct GemmShared {
    StagedTiles<kColumns> tiles;
    std::int32_t position[kTileSlots * kColumns];  // input position of (slot, place), or -1
    std::int32_t tap[kTileSlots];                  // weight offset of a slot
    std::int32_t last;
    double scratch[kTileWarps];
};

// Takes k = channel * slots + slot apart by a multiplication. All k are given doubled, so that the inverse of 1 fits.
struct Depth {
    unsigned inverse;  // 2^31 / slots, rounded up: exact as long as k * slots < 2^31, to which ops/layout.py keeps

    __device__ explicit Depth(int slots)
        : inverse((0x80000000u + static_cast<unsigned>(slots) - 1) / static_cast<unsigned>(slots)) {}

    __device__ int channel(int twice_k) const {
        return static_cast<int>(__umulhi(static_cast<unsigned>(twice_k), inverse));
    }
};

// T is the type of the weights.
template <class T, int kColumns>
struct GemmTile {
    static constexpr int kDepth = kTileDepth<kColumns>;
    static constexpr int kLoadsA = kTileRows * kDepth / kTileThreads;
    static constexpr int kLoadsB = kColumns * kDepth / kTileThreads;
    static constexpr int kStepA = kTileThreads / kDepth;  // rows between a thread's loads of A
    static constexpr int kStepB = kTileThreads / kColumns;    // depth between a thread's loads of B

    const Gather& g;
    const Unit& unit;
    const HalfStepParams& p;
    GemmShared<kColumns>& s;
    int thread;
    TileProduct<kColumns> product;

    __device__ GemmTile(const Gather& g, const Unit& unit, const HalfStepParams& p, GemmShared<kColumns>& s)
        : g(g), unit(unit), p(p), s(s), thread(thread_number()), product(p.precision, thread) {}

    __device__ void run() {
        const Input x = input_of(p, g, unit.group);
        const int first = p.table[g.tile_slots + 2 * unit.tile], count = p.table[g.tile_slots + 2 * unit.tile + 1];
        for (int begin = 0; begin < count; begin += kTileSlots) {
            const int slots = min(kTileSlots, count - begin);
            find_positions(p.table + first + begin, slots);
            multiply(x, slots);
        }
        if (!join_splits(product.sums, unit, p, s.last)) return;
        store();
    }

    // The input positions of every slot for this tile's places, and the taps.
    __device__ void find_positions(const std::int32_t* slots, int count) {
        const Place place = place_of(g, p.table, unit.tile * kColumns + thread % kColumns);
        for (int j = thread / kColumns; j < count; j += kStepB) {
            const Slot slot = slot_of(g, p.table, slots[j]);
            s.position[j * kColumns + thread % kColumns] = input_position(g, p.table, place, slot);
            if (thread % kColumns == 0) s.tap[j] = slot.tap * g.tap_stride;
        }
        __syncthreads();
    }

    __device__ void multiply(const Input& x, int slots) {
        const int depth = (unit.channel_end - unit.channel) * slots;
        // Read once, not in every chunk.
        const int row_stride = g.row_stride, channel_stride = g.channel_stride, inputs = g.inputs;
        const T* weight = as_it_is(static_cast<const T*>(p.weights[g.op]) + unit.group * g.group_stride +
                                   unit.row * row_stride + unit.channel * channel_stride);
        const float* data = as_it_is(x.data + unit.channel * inputs);
        // Where this thread loads: one depth of A, kLoadsA rows; one column of B, kLoadsB depths.
        const int depth_a = thread % kDepth, row_a = thread / kDepth, last_row = g.rows - unit.row - 1;
        const int depth_b = thread / kColumns, column_b = thread % kColumns;
        const Depth split(slots);
        T a[kLoadsA];
        float b[kLoadsB];

        // All loads of a chunk are under way before the first is used. Past the end of k, A is zero and B anything that
        // was read before; rows past the last repeat it, and are never stored.
        auto load = [&](int begin) {
            const int k = begin + depth_a;
            if (k < depth) {
                const int channel = split.channel(2 * k);
                const int corner = s.tap[k - channel * slots] + channel * channel_stride;
#pragma unroll
                for (int i = 0; i < kLoadsA; ++i)
                    a[i] = __ldg(weight + (corner + min(row_a + i * kStepA, last_row) * row_stride));
            } else {
#pragma unroll
                for (int i = 0; i < kLoadsA; ++i) a[i] = from_float<T>(0.0f);
            }
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i) {
                const int twice_k = min(2 * (begin + depth_b) + 2 * i * kStepB, 2 * depth - 2);
                const int channel = split.channel(twice_k);
                const unsigned row = static_cast<unsigned>(twice_k) * (kColumns / 2) -
                                     static_cast<unsigned>(channel) * static_cast<unsigned>(slots * kColumns);
                const int position = s.position[row + static_cast<unsigned>(column_b)];
                b[i] = position >= 0 ? __ldg(data + (channel * inputs + position)) : 0.0f;
            }
        };
        auto stage = [&](int buffer) {
#pragma unroll
            for (int i = 0; i < kLoadsA; ++i)
                s.tiles.a[buffer][depth_a][swizzled(row_a + i * kStepA % 8, depth_a) + i * kStepA / 8 * 8] = to_float(a[i]);
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i) s.tiles.b[buffer][depth_b + i * kStepB][column_b] = x.scaled(b[i]);
        };

        // 1) The first chunk.
        load(0);
        stage(0);
        __syncthreads();
        int buffer = 0;
        for (int begin = kDepth;; begin += kDepth, buffer ^= 1) {
            // 2) The next chunk travels while this one is multiplied.
            const bool more = begin < depth;
            if (more) load(begin);
            product.add(s.tiles, buffer);
            if (!more) break;
            stage(buffer ^ 1);
            __syncthreads();
        }
        // 3) The tables and buffers are free again.
        __syncthreads();
    }

    __device__ void store() {
        double square_sum = 0.0;
        float* out = p.outputs + g.output + (unit.group * g.rows + unit.row) * g.positions;
        const int rows = min(kTileRows, g.rows - unit.row);
#pragma unroll
        for (int i = 0; i < TileProduct<kColumns>::kSums; ++i) {
            const int row = product.row(i), index = unit.tile * kColumns + product.column(i);
            const int position = g.order >= 0 ? p.table[g.order + index] : (index < g.positions ? index : -1);
            if (row >= rows || position < 0) continue;
            out[row * g.positions + position] = product.sums[i];
            square_sum += squared(product.sums[i]);
        }
        store_square_sum(square_sum, unit.norm, p, s.scratch);
    }
};

}  // namespace sn_fast
