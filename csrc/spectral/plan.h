// The plan of grouped power iteration, as the device reads it. sn_fast/ops/plan.py and items.py write it: same
// fields, same order.
//
// A linear layer, a convolution of any geometry, its adjoint and a transposed convolution are all one map, per group of
// channels: out[m, n] = sum_c sum_slot W(m, c, tap(slot)) in[c, index(n, slot)]. Geometry is data: along each axis
// `entry[position][slot]` is the input coordinate (times its stride in the input) that the slot reads, or -1. A slot is
// a tap of the kernel, or, in the adjoint of a padding that reads an input several times, one of its repetitions.
#pragma once

#include <cstdint>

namespace sn_fast {

constexpr int kAxes = 3;  // spatial axes; missing ones have size 1

// One direction (A or A^T) of one operator. Offsets count elements; those into `table` are marked so.
struct OperatorMap {
    std::int32_t op;     // which weight
    std::int32_t dtype;  // of the weight (Dtype)
    std::int32_t groups;
    std::int32_t rows;       // output channels of one group
    std::int32_t channels;   // input channels of one group
    std::int32_t positions;  // output positions of one channel
    std::int32_t inputs;     // input positions of one channel
    // Of the weight.
    std::int32_t group_stride, row_stride, channel_stride, tap_stride;
    std::int32_t size[kAxes];  // output positions along each axis
    std::int32_t slots[kAxes];
    std::int32_t entry[kAxes];   // in `table`: [size][slots]
    std::int32_t order;          // in `table`: position of each place of the tiles or -1; -1: as numbered
    std::int32_t tile_slots;     // in `table`: per tile of positions (its Slots in `table`, their number)
    std::int32_t tiles;          // tiles of positions
    std::int32_t input, output;  // first element of the vectors in their buffers
    std::int32_t norm_in;        // first partial square sum of the input, and their number per group; number 0: unit
    std::int32_t norms_in;
    std::int32_t norm_out;  // likewise of the result
    std::int32_t norms_out;
};

// A slot of all axes together, as the table holds it.
struct alignas(16) Slot {
    std::int32_t along[kAxes];  // the slot of each axis
    std::int32_t weight;        // offset of its tap in the weight
};

enum class TileKind : std::int32_t {
    kDot = 0,     // a matrix whose rows are contiguous: dot products
    kAxpy = 1,    // a matrix whose columns are contiguous: a sum of rows
    kDirect = 2,  // few rows: a thread per position
    kGemm64 = 3,  // implicit GEMM, 64 rows x 64 positions
    kGemm16 = 4,  // implicit GEMM, 64 rows x 16 positions
};

// The work of one block at a time: a tile of the result, or a part of its sum over channels.
struct WorkItem {
    std::int32_t kind;
    std::int32_t map;
    std::int32_t group;
    std::int32_t row;                   // first row (kDirect: first warp's tile among all tiles of the operator)
    std::int32_t tile;                  // tile of positions
    std::int32_t channel, channel_end;  // range of the sum
    std::int32_t split, splits;         // this part, and how many there are
    std::int32_t counter;               // counts the parts that are done
    std::int32_t partial;               // first element of the tile's partial sums
    std::int32_t norm;                  // where the tile's square sum goes
    std::int32_t slots, n_slots;        // of the tile: its Slots in `table` (kGemm64, kGemm16)
};

// A slice of a vector to be normalised, or (length 0) sigma of an operator to be found.
struct VectorSlice {
    std::int32_t op;
    std::int32_t second;  // 0: result of the first half step, 1: of the second
    std::int32_t first;   // element within the vector
    std::int32_t length;
    std::int32_t output;  // of the vector in its buffer
    std::int32_t norm;    // first partial square sum of the slice's group (of group 0 where sigma is wanted)
    std::int32_t norms;   // their number per group
    std::int32_t groups;
};

}  // namespace sn_fast
