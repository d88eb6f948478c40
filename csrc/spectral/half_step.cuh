// The kernel of a half step: every kind of tile, one unit of work after the other.
#pragma once

#include "spectral/direct.cuh"
#include "spectral/gemm.cuh"
#include "spectral/matrix.cuh"

namespace sn_fast {

constexpr int kBlocksPerMultiprocessor = 3;  // leaves 168 registers a thread: enough not to spill

struct HalfStepShared {
    Unit unit;  // not in registers: tiles need them all
    int next;
    union {
        MatrixShared matrix;
        DirectShared direct;
        GemmShared<64> gemm64;
        GemmShared<16> gemm16;
    };
};

// A unit of an operator whose weights are of type T.
template <class T>
__device__ void run_unit(const Gather& g, const HalfStepParams& p, HalfStepShared& s) {
    const Unit& unit = s.unit;
    const T* weight = static_cast<const T*>(p.weights[g.op]);
    switch (static_cast<TileKind>(unit.kind)) {
        case TileKind::kDot: return dot_tile(g, unit, weight + unit.group * g.group_stride, p, s.matrix);
        case TileKind::kAxpy: return axpy_tile(g, unit, weight + unit.group * g.group_stride, p, s.matrix);
        case TileKind::kDirect: return direct_tile(g, unit, weight, p, s.direct);
        case TileKind::kGemm64: return GemmTile<T, 64>(g, unit, p, s.gemm64).run();
        case TileKind::kGemm16: return GemmTile<T, 16>(g, unit, p, s.gemm16).run();
    }
}

// One half step of all operators. Blocks take the units in their order, the costly ones first, whenever they are free:
// also those blocks that start late because other work holds their place.
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor) half_step_kernel(HalfStepParams p) {
    HalfStepShared& s = shared_memory<HalfStepShared>();
    constexpr int kWords = sizeof(Unit) / sizeof(std::int32_t);
    if (p.changes && p.changes[p.n_operators] == 0) return;
    if (thread_number() == 0) s.next = atomicAdd(p.taken, 1);
    __syncthreads();
    for (int number = s.next; number < p.n_units; number = s.next) {
        const int thread = thread_number();
        // 1) The unit to shared memory.
        if (thread < kWords)
            reinterpret_cast<std::int32_t*>(&s.unit)[thread] =
                reinterpret_cast<const std::int32_t*>(p.units + number)[thread];
        __syncthreads();
        // 2) The number of the next one, asked for together with what the tile begins with.
        const Gather& g = p.gathers[s.unit.gather];
        const auto dtype = static_cast<Dtype>(g.dtype);
        if (thread == 0) s.next = atomicAdd(p.taken, 1);
        // 3) The tile, of a weight that has changed.
        if (!p.changes || p.changes[g.op] != 0) {
            switch (dtype) {
                case Dtype::kFloat32: run_unit<float>(g, p, s); break;
                case Dtype::kFloat16: run_unit<half_t>(g, p, s); break;
                case Dtype::kBfloat16: run_unit<bfloat16_t>(g, p, s); break;
            }
        }
        __syncthreads();  // the next unit uses the same shared memory
    }
}

}  // namespace sn_fast
