// Implicit-GEMM tiles: M = rows, N = positions, K = channels x slots; the input is gathered through the plan's tables.
#pragma once

#include "spectral/product.cuh"
#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kTileSlots = 64;  // slots whose positions are kept at a time

template <int kColumns>
struct GemmShared {
    StagedTiles<kColumns> tiles;
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
    static constexpr int kLoadsA = kTileRows * kTileDepth / kTileThreads;
    static constexpr int kLoadsB = kColumns * kTileDepth / kTileThreads;
    static constexpr int kStepA = kTileThreads / kTileDepth;  // rows between a thread's loads of A
    static constexpr int kStepB = kTileThreads / kColumns;    // depth between a thread's loads of B

    const Gather& g;
    const Unit& unit;
    const HalfStepParams& p;
    GemmShared<kColumns>& s;
    int thread;
    TileProduct<kColumns> product;

    __device__ GemmTile(const Gather& g, const Unit& unit, const HalfStepParams& p, GemmShared<kColumns>& s)
        : g(g), unit(unit), p(p), s(s), thread(static_cast<int>(threadIdx.x)), product(p.precision) {}

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
            s.position[j][thread % kColumns] = input_position(g, p.table, place, slot);
            if (thread % kColumns == 0) s.tap[j] = slot.tap * g.tap_stride;
        }
        __syncthreads();
    }

    // kLoadsA elements of one depth of A, every kStepA rows; zero past the last row.
    template <class T>
    __device__ static void load_rows(const void* weights, int offset, int stride, int rows, float (&a)[kLoadsA]) {
        const T* weight = static_cast<const T*>(weights) + offset;
#pragma unroll
        for (int i = 0; i < kLoadsA; ++i) a[i] = i * kStepA < rows ? to_float(weight[i * kStepA * stride]) : 0.0f;
    }

    __device__ void multiply(const Input& x, int slots) {
        const int depth = (unit.channel_end - unit.channel) * slots;
        // Read once, not in every chunk.
        const void* weights = p.weights[g.op];
        const Dtype dtype = static_cast<Dtype>(g.dtype);
        const int row_stride = g.row_stride, channel_stride = g.channel_stride, inputs = g.inputs;
        const int corner = unit.group * g.group_stride + unit.row * row_stride;
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
            const int tap = inside ? s.tap[at_a.slot] + at_a.channel * channel_stride + row_a * row_stride : 0;
            const int count = inside ? rows : 0;
            switch (dtype) {
                case Dtype::kFloat32: load_rows<float>(weights, corner + tap, row_stride, count, a); break;
                case Dtype::kFloat16: load_rows<half_t>(weights, corner + tap, row_stride, count, a); break;
                case Dtype::kBfloat16: load_rows<bfloat16_t>(weights, corner + tap, row_stride, count, a); break;
            }
            Depth at = at_b;
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i) {
                b[i] = 0.0f;
                if (begin + depth_b + i * kStepB < depth) {
                    const int position = s.position[at.slot][column_b];
                    if (position >= 0) b[i] = x[at.channel * inputs + position];
                }
                at.advance(step, step_rest, slots);
            }
            at_a.advance(stride, stride_rest, slots);
            at_b.advance(stride, stride_rest, slots);
        };
        auto stage = [&](int buffer) {
#pragma unroll
            for (int i = 0; i < kLoadsA; ++i) s.tiles.a[buffer][depth_a][row_a + i * kStepA] = a[i];
#pragma unroll
            for (int i = 0; i < kLoadsB; ++i) s.tiles.b[buffer][depth_b + i * kStepB][column_b] = b[i];
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
