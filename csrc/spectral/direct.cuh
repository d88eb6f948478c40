// Tiles of a map with few rows (depthwise convolutions, the adjoint of a first layer): a thread per position.
#pragma once

#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kDirectRows = 4;
constexpr int kDirectPerLane = 4;
constexpr int kDirectTile = kWarp * kDirectPerLane;  // positions of one warp
constexpr int kDirectSlots = 16;                     // slots whose positions are kept at a time
constexpr int kDirectChunk = 16;                     // products that are summed up on their own

struct DirectShared {
    std::int32_t position[kTileWarps][kDirectSlots][kDirectTile];  // input position of (slot, place), or -1
    std::int32_t weight[kTileWarps][kDirectSlots];                 // weight offset of a slot
    std::int32_t last;
};

// Each warp has a tile of its own, number item.row + warp: 4 rows x 128 positions of one group.
template <class T>
__device__ void direct_tile(const OperatorMap& g, const WorkItem& item, const T* weights, const HalfStepParams& p,
                            DirectShared& s) {
    const int thread = opaque_thread_index(), lane = thread % kWarp, warp = thread / kWarp;
    const int number = item.row + warp;
    const int group = number / g.norms_out;
    const int block = number % g.norms_out / g.tiles, tile = number % g.tiles;
    float sums[kDirectRows * kDirectPerLane] = {};
    int place_position[kDirectPerLane];
    const bool any = group < g.groups;  // the last block of an operator may have idle warps
    const int rows = any ? min(kDirectRows, g.rows - block * kDirectRows) : 0;
    if (any) {
        // Read once, not for every channel.
        const int inputs = g.inputs, channel_stride = g.channel_stride, channels = item.channel_end - item.channel;
        int row[kDirectRows];  // a row past the end repeats the last, unused
#pragma unroll
        for (int r = 0; r < kDirectRows; ++r) row[r] = min(r, rows - 1) * g.row_stride;
        Place places[kDirectPerLane];
#pragma unroll
        for (int i = 0; i < kDirectPerLane; ++i) {
            places[i] = place_of(g, p.table, tile * kDirectTile + i * kWarp + lane);
            place_position[i] = places[i].position;
        }
        const T* w = opaque(weights + group * g.group_stride + block * kDirectRows * g.row_stride +
                            item.channel * channel_stride);
        const Slot* slots = slots_at(p.table, p.table[g.tile_slots + 2 * tile]);
        const int count = p.table[g.tile_slots + 2 * tile + 1];
        const Input x = input_of(p, g, group);
        const float* data = opaque(x.data + item.channel * inputs);
        auto& position = s.position[warp];
        for (int begin = 0; begin < count; begin += kDirectSlots) {
            // 1) Where the slots read. Each lane keeps its own places: only the weights' offsets are for all.
            const int n_slots = min(kDirectSlots, count - begin), depth = n_slots * channels;
            if (lane < n_slots) s.weight[warp][lane] = slots[begin + lane].weight;
#pragma unroll 2
            for (int j = 0; j < n_slots; ++j) {
                const Slot slot = slots[begin + j];
#pragma unroll
                for (int i = 0; i < kDirectPerLane; ++i)
                    position[j][i * kWarp + lane] = input_position(p.table, places[i], slot);
            }
            __syncwarp();
            // 2) All (slot, channel) pairs, in sums of sums: the error grows as the root of their number, not as that
            //    of all terms.
            int slot = 0, channel = 0;
            for (int first = 0; first < depth; first += kDirectChunk) {
                float chunk[kDirectRows * kDirectPerLane] = {};
                const int end = min(first + kDirectChunk, depth);
#pragma unroll 2
                for (int k = first; k < end; ++k) {
                    float values[kDirectPerLane];
                    T factors[kDirectRows];
#pragma unroll
                    for (int i = 0; i < kDirectPerLane; ++i) {
                        const int at = position[slot][i * kWarp + lane];
                        values[i] = at >= 0 ? __ldg(data + (channel * inputs + at)) : 0.0f;
                    }
                    const int corner = s.weight[warp][slot] + channel * channel_stride;
#pragma unroll
                    for (int r = 0; r < kDirectRows; ++r) factors[r] = __ldg(w + (corner + row[r]));
#pragma unroll
                    for (int i = 0; i < kDirectPerLane; ++i) values[i] = x.scaled(values[i]);
#pragma unroll
                    for (int r = 0; r < kDirectRows; ++r) {
#pragma unroll
                        for (int i = 0; i < kDirectPerLane; ++i)
                            chunk[r * kDirectPerLane + i] += to_float(factors[r]) * values[i];
                    }
                    const bool wraps = channel + 1 == channels;
                    channel = wraps ? 0 : channel + 1;
                    slot += wraps ? 1 : 0;
                }
#pragma unroll
                for (int i = 0; i < kDirectRows * kDirectPerLane; ++i) sums[i] += chunk[i];
            }
            __syncwarp();
        }
    }
    if (!join_splits(sums, item, p, s.last)) return;
    if (!any) return;
    // 3) The result, and the warp's square sum.
    double square_sum = 0.0;
    float* out = p.outputs + g.output + (group * g.rows + block * kDirectRows) * g.positions;
#pragma unroll
    for (int r = 0; r < kDirectRows; ++r) {
#pragma unroll
        for (int i = 0; i < kDirectPerLane; ++i) {
            if (r >= rows || place_position[i] < 0) continue;
            out[r * g.positions + place_position[i]] = sums[r * kDirectPerLane + i];
            square_sum += squared(sums[r * kDirectPerLane + i]);
        }
    }
    square_sum = warp_reduce(square_sum, Add{});
    if (lane == 0) p.norms_out[item.norm + warp] = square_sum;
}

}  // namespace sn_fast
