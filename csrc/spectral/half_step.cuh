// The kernel of a half step: every kind of tile, one unit of work after the other.
#pragma once

#include <algorithm>

#include "spectral/direct.cuh"
#include "spectral/gemm.cuh"
#include "spectral/matrix.cuh"

namespace sn_fast {

struct HalfStepShared {
    Unit unit;  // not in registers: tiles need them all
    Gather gather;
    int next;
    union {
        MatrixShared matrix;
        DirectShared direct;
        GemmShared<64> gemm64;
        GemmShared<16> gemm16;
    };
};

// A unit of an operator whose weights are of type T.
template <class T, Precision kPrecision>
__device__ void run_unit(const HalfStepParams& p, HalfStepShared& s) {
    const Unit& unit = s.unit;
    const Gather& g = s.gather;
    const T* weight = static_cast<const T*>(p.weights[g.op]);
    switch (static_cast<TileKind>(unit.kind)) {
        case TileKind::kDot: return dot_tile(g, unit, weight + unit.group * g.group_stride, p, s.matrix);
        case TileKind::kAxpy: return axpy_tile(g, unit, weight + unit.group * g.group_stride, p, s.matrix);
        case TileKind::kDirect: return direct_tile(g, unit, weight, p, s.direct);
        case TileKind::kGemm64: return GemmTile<T, 64>(g, unit, p, kPrecision, s.gemm64).run();
        case TileKind::kGemm16: return GemmTile<T, 16>(g, unit, p, kPrecision, s.gemm16).run();
    }
}

// Copies a struct of integers to shared memory, an integer per lane.
template <class T>
__device__ void copy_by_lanes(T& to, const T* from, int lane) {
    static_assert(sizeof(T) % sizeof(std::int32_t) == 0 && sizeof(T) <= kWarp * sizeof(std::int32_t));
    if (lane < static_cast<int>(sizeof(T) / sizeof(std::int32_t)))
        reinterpret_cast<std::int32_t*>(&to)[lane] = __ldg(reinterpret_cast<const std::int32_t*>(from) + lane);
}

// One half step of all operators. Blocks take the units in their order, the costly ones first, whenever they are free:
// also those blocks that start late because other work holds their place.
template <Precision kPrecision>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor) half_step_kernel(HalfStepParams p) {
    HalfStepShared& s = shared_memory<HalfStepShared>();
    let_next_start();
    if (p.changes && p.changes[p.n_operators] == 0) return wait_for_previous();
    if (thread_number() == 0) s.next = atomicAdd(p.taken, 1);
    __syncthreads();
    for (int number = s.next; number < p.n_units; number = s.next) {
        // 1) The unit and its operator to shared memory; meanwhile another warp asks for the number of the next unit.
        const int thread = thread_number();
        int next = 0;
        if (thread < kWarp) {
            copy_by_lanes(s.unit, p.units + number, thread);
            __syncwarp();
            copy_by_lanes(s.gather, p.gathers + s.unit.gather, thread);
        } else if (thread == kWarp) {
            next = atomicAdd(p.taken, 1);
        }
        __syncthreads();
        if (thread == kWarp) s.next = next;
        // 2) The tile, of a weight that has changed.
        if (!p.changes || p.changes[s.gather.op] != 0) {
            switch (static_cast<Dtype>(s.gather.dtype)) {
                case Dtype::kFloat32: run_unit<float, kPrecision>(p, s); break;
                case Dtype::kFloat16: run_unit<half_t, kPrecision>(p, s); break;
                case Dtype::kBfloat16: run_unit<bfloat16_t, kPrecision>(p, s); break;
            }
        }
        __syncthreads();  // the next unit uses the same shared memory
    }
    wait_for_previous();  // also where there was no unit: what is launched next relies on both having ended
}

template <Precision kPrecision>
void launch_half_step_in(const HalfStepParams& params, const Stream& stream, bool early) {
    const unsigned blocks = static_cast<unsigned>(std::min(params.n_units, parallel_blocks(stream.device)));
    launch(half_step_kernel<kPrecision>, "half_step", blocks, kTileThreads, sizeof(HalfStepShared), stream, params, early);
}

}  // namespace sn_fast
