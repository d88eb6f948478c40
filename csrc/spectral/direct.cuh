// Tiles of a map with few rows (depthwise convolutions, the adjoint of a first layer): a thread per position.
#pragma once

#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kDirectRows = 4;
constexpr int kDirectPerLane = 4;
constexpr int kDirectTile = kWarp * kDirectPerLane;  // positions of one warp
constexpr int kDirectChunk = 16;                      // products that are summed up on their own

struct DirectShared {
    std::int32_t last;
};

// Each warp has a tile of its own, number unit.row + warp: 4 rows x 128 positions of one group.
template <class T>
__device__ void direct_tile(const Gather& g, const Unit& unit, const T* weights, const HalfStepParams& p,
                            DirectShared& s) {
    const int thread = thread_number(), lane = thread % kWarp, warp = thread / kWarp;
    const int number = unit.row + warp;
    const int group = number / g.norms_out;
    const int block = number % g.norms_out / g.tiles, tile = number % g.tiles;
    float sums[kDirectRows * kDirectPerLane] = {};
    Place places[kDirectPerLane];
    const bool any = group < g.groups;  // the last block of an operator may have idle warps
    const int rows = any ? min(kDirectRows, g.rows - block * kDirectRows) : 0;
    if (any) {
        const Input x = input_of(p, g, group);
        // Read once, not for every channel.
        const int inputs = g.inputs, channel_stride = g.channel_stride;
        int row[kDirectRows];  // a row past the end repeats the last, unused
#pragma unroll
        for (int r = 0; r < kDirectRows; ++r) row[r] = min(r, rows - 1) * g.row_stride;
#pragma unroll
        for (int i = 0; i < kDirectPerLane; ++i)
            places[i] = place_of(g, p.table, tile * kDirectTile + i * kWarp + lane);
        const T* block_weights = weights + group * g.group_stride + block * kDirectRows * g.row_stride;
        const int first = p.table[g.tile_slots + 2 * tile], count = p.table[g.tile_slots + 2 * tile + 1];
        const int channels = unit.channel_end - unit.channel;
        // Sums of sums: the error grows as the root of their number, not as that of all terms.
        float chunk[kDirectRows * kDirectPerLane] = {};
        int terms = 0;  // in a chunk, of whatever slots
        for (int j = 0; j < count; ++j) {
            // 1) Where this slot reads, for every position of the lane.
            const Slot slot = slot_of(g, p.table, p.table[first + j]);
            int at[kDirectPerLane];
#pragma unroll
            for (int i = 0; i < kDirectPerLane; ++i) at[i] = input_position(g, p.table, places[i], slot);
            // 2) All channels.
            const T* w = as_it_is(block_weights + slot.tap * g.tap_stride + unit.channel * channel_stride);
            const float* data = as_it_is(x.data + unit.channel * inputs);
            for (int c = 0; c < channels;) {
                const int end = min(c + kDirectChunk - terms, channels);
                terms += end - c;
#pragma unroll 2
                for (; c < end; ++c) {
                    float values[kDirectPerLane];
                    T factors[kDirectRows];
#pragma unroll
                    for (int i = 0; i < kDirectPerLane; ++i)
                        values[i] = at[i] >= 0 ? __ldg(data + (c * inputs + at[i])) : 0.0f;
#pragma unroll
                    for (int r = 0; r < kDirectRows; ++r) factors[r] = __ldg(w + (c * channel_stride + row[r]));
#pragma unroll
                    for (int i = 0; i < kDirectPerLane; ++i) values[i] = x.scaled(values[i]);
#pragma unroll
                    for (int r = 0; r < kDirectRows; ++r) {
#pragma unroll
                        for (int i = 0; i < kDirectPerLane; ++i)
                            chunk[r * kDirectPerLane + i] += to_float(factors[r]) * values[i];
                    }
                }
                if (terms < kDirectChunk) break;
                terms = 0;
#pragma unroll
                for (int i = 0; i < kDirectRows * kDirectPerLane; ++i) {
                    sums[i] += chunk[i];
                    chunk[i] = 0.0f;
                }
            }
        }
#pragma unroll
        for (int i = 0; i < kDirectRows * kDirectPerLane; ++i) sums[i] += chunk[i];
    }
    if (!join_splits(sums, unit, p, s.last)) return;
    if (!any) return;
    // 3) The result, and the warp's square sum.
    double square_sum = 0.0;
    float* out = p.outputs + g.output + (group * g.rows + block * kDirectRows) * g.positions;
#pragma unroll
    for (int r = 0; r < kDirectRows; ++r) {
#pragma unroll
        for (int i = 0; i < kDirectPerLane; ++i) {
            if (r >= rows || places[i].position < 0) continue;
            out[r * g.positions + places[i].position] = sums[r * kDirectPerLane + i];
            square_sum += squared(sums[r * kDirectPerLane + i]);
        }
    }
    square_sum = warp_reduce(square_sum, Add{});
    if (lane == 0) p.norms_out[unit.norm + warp] = square_sum;
}

}  // namespace sn_fast
