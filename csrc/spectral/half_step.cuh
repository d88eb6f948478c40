// The kernel of a half step: every kind of tile, one unit of work after the other.
#pragma once

#include "spectral/direct.cuh"
#include "spectral/gemm.cuh"
#include "spectral/matrix.cuh"

namespace sn_fast {

constexpr int kBlocksPerMultiprocessor = 3;  // leaves 168 registers a thread: enough not to spill

struct HalfStepShared {
    int unit;  // a register less in every tile
    union {
        MatrixShared matrix;
        DirectShared direct;
        GemmShared<64> gemm64;
        GemmShared<16> gemm16;
    };
};

// Tiles that read their weights as one type throughout.
template <class T>
__device__ void run_typed(const Gather& g, const Unit& unit, const HalfStepParams& p, HalfStepShared& s) {
    const T* weight = static_cast<const T*>(p.weights[g.op]);
    switch (static_cast<TileKind>(unit.kind)) {
        case TileKind::kDot: return dot_tile(g, unit, weight + unit.group * g.group_stride, p, s.matrix);
        case TileKind::kAxpy: return axpy_tile(g, unit, weight + unit.group * g.group_stride, p, s.matrix);
        default: return direct_tile(g, unit, weight, p, s.direct);
    }
}

// One half step of all operators: blocks take the units of work in turn, the costly ones first.
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor) half_step_kernel(HalfStepParams p) {
    HalfStepShared& s = shared_memory<HalfStepShared>();
    if (threadIdx.x == 0) s.unit = static_cast<int>(blockIdx.x);
    __syncthreads();
    while (s.unit < p.n_units) {
        const Unit unit = p.units[s.unit];
        const Gather& g = p.gathers[unit.gather];
        if (unit.kind == static_cast<int>(TileKind::kGemm64)) {
            GemmTile<64>(g, unit, p, s.gemm64).run();
        } else if (unit.kind == static_cast<int>(TileKind::kGemm16)) {
            GemmTile<16>(g, unit, p, s.gemm16).run();
        } else {
            switch (static_cast<Dtype>(g.dtype)) {
                case Dtype::kFloat32: run_typed<float>(g, unit, p, s); break;
                case Dtype::kFloat16: run_typed<half_t>(g, unit, p, s); break;
                case Dtype::kBfloat16: run_typed<bfloat16_t>(g, unit, p, s); break;
            }
        }
        __syncthreads();  // the next unit uses the same shared memory
        if (threadIdx.x == 0) s.unit += static_cast<int>(gridDim.x);
        __syncthreads();
    }
}

}  // namespace sn_fast
