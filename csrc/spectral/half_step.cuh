// The kernel of a half step: every kind of tile, one item of work after the other.
#pragma once

#include <algorithm>

#include "spectral/direct.cuh"
#include "spectral/gemm.cuh"
#include "spectral/matrix.cuh"

namespace sn_fast {

struct HalfStepShared {
    WorkItem item;  // not in registers: tiles need them all
    OperatorMap map;
    int next;
    union {
        MatrixShared matrix;
        DirectShared direct;
        GemmShared<64> gemm64;
        GemmShared<16> gemm16;
    };
};

// A item of an operator whose weights are of type T.
template <class T, Precision kPrecision>
__device__ void run_unit(const HalfStepParams& p, HalfStepShared& s) {
    const WorkItem& item = s.item;
    const OperatorMap& g = s.map;
    const T* weight = static_cast<const T*>(p.weights[g.op]);
    switch (static_cast<TileKind>(item.kind)) {
        case TileKind::kDot: return dot_tile(g, item, weight + item.group * g.group_stride, p, s.matrix);
        case TileKind::kAxpy: return axpy_tile(g, item, weight + item.group * g.group_stride, p, s.matrix);
        case TileKind::kDirect: return direct_tile(g, item, weight, p, s.direct);
        case TileKind::kGemm64: return GemmTile<T, 64>(g, item, p, kPrecision, s.gemm64).run();
        case TileKind::kGemm16: return GemmTile<T, 16>(g, item, p, kPrecision, s.gemm16).run();
    }
}

// Copies a struct of integers to shared memory, an integer per lane.
template <class T>
__device__ void copy_by_lanes(T& to, const T* from, int lane) {
    static_assert(sizeof(T) % sizeof(std::int32_t) == 0 && sizeof(T) <= kWarp * sizeof(std::int32_t));
    if (lane < static_cast<int>(sizeof(T) / sizeof(std::int32_t)))
        reinterpret_cast<std::int32_t*>(&to)[lane] = __ldg(reinterpret_cast<const std::int32_t*>(from) + lane);
}

// One half step of all operators. Blocks take the items in their order, the costly ones first, whenever they are free:
// also those blocks that start late because other work holds their place.
template <Precision kPrecision>
__global__ void __launch_bounds__(kTileThreads, kBlocksPerMultiprocessor) power_step_half(HalfStepParams p) {
    HalfStepShared& s = shared_memory<HalfStepShared>();
    let_next_start();
    if (p.changes && p.changes[p.n_operators] == 0) return wait_for_previous();
    if (opaque_thread_index() == 0) s.next = atomicAdd(p.taken, 1);
    __syncthreads();
    for (int number = s.next; number < p.n_items; number = s.next) {
        // 1) The item and its operator to shared memory; meanwhile another warp asks for the number of the next item.
        const int thread = opaque_thread_index();
        int next = 0;
        if (thread < kWarp) {
            copy_by_lanes(s.item, p.items + number, thread);
            __syncwarp();
            copy_by_lanes(s.map, p.maps + s.item.map, thread);
        } else if (thread == kWarp) {
            next = atomicAdd(p.taken, 1);
        }
        __syncthreads();
        if (thread == kWarp) s.next = next;
        // 2) The tile, of a weight that has changed.
        if (!p.changes || p.changes[s.map.op] != 0) {
            switch (static_cast<Dtype>(s.map.dtype)) {
                case Dtype::kFloat32: run_unit<float, kPrecision>(p, s); break;
                case Dtype::kFloat16: run_unit<half_t, kPrecision>(p, s); break;
                case Dtype::kBfloat16: run_unit<bfloat16_t, kPrecision>(p, s); break;
            }
        }
        __syncthreads();  // the next item uses the same shared memory
    }
    wait_for_previous();  // also where there was no item: what is launched next relies on both having ended
}

template <Precision kPrecision>
void launch_half_step_in(const HalfStepParams& params, const Stream& stream, bool early) {
    const unsigned blocks = static_cast<unsigned>(std::min(params.n_items, parallel_blocks(stream.device)));
    launch(power_step_half<kPrecision>, "half_step", blocks, kTileThreads, sizeof(HalfStepShared), stream, params,
           early);
}

}  // namespace sn_fast
