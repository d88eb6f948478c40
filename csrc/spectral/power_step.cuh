// The kernels of grouped power iteration.
#pragma once

#include "spectral/direct.cuh"
#include "spectral/gemm.cuh"
#include "spectral/matrix.cuh"

namespace sn_fast {

constexpr int kBlocksPerMultiprocessor = 3;  // leaves 168 registers a thread: enough not to spill

union HalfStepShared {
    MatrixShared matrix;
    DirectShared direct;
    GemmShared<64> gemm64;
    GemmShared<16> gemm16;
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
    for (int i = static_cast<int>(blockIdx.x); i < p.n_units; i += static_cast<int>(gridDim.x)) {
        const Unit unit = p.units[i];
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
    }
}

constexpr int kFinishThreads = 256;

struct FinishParams {
    const Piece* pieces;
    float* results[2];
    const double* norms[2];
    float* sigmas;
    std::int64_t* groups;
    const float* given[2][kMaxOperators];
};

static_assert(sizeof(FinishParams) <= 4096, "kernel parameters");

struct FinishShared {
    double sigma[kFinishThreads / kWarp];
    int group[kFinishThreads / kWarp];
};

// Whether a square sum (or NaN) beats another as the largest.
__device__ inline bool is_larger(double a, double b) { return a > b || (a != a && b == b); }

// Normalises one piece of a vector in place, or finds sigma and its group.
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(FinishParams p) {
    const Piece piece = p.pieces[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x);
    const double* norms = p.norms[piece.second] + piece.norm;
    if (piece.length > 0) {
        // 1) A piece of one group: scaled, or as given where its norm is zero or not finite.
        const Scale scale = inverse_norm(sum_partials(norms, piece.norms));
        float* x = p.results[piece.second] + piece.output + piece.first;
        const float* given = p.given[piece.second][piece.op] + piece.first;
        for (int i = thread; i < piece.length; i += kFinishThreads)
            x[i] = scale.alive ? x[i] * scale.first * scale.second : given[i];
        return;
    }
    // 2) The largest norm over the groups: each warp takes every 8th group.
    FinishShared& s = shared_memory<FinishShared>();
    const int warp = thread / kWarp;
    double best = -1.0;
    int best_group = 0;
    for (int group = warp; group < piece.groups; group += kFinishThreads / kWarp) {
        const double sum = sum_partials(norms + group * piece.norms, piece.norms);
        if (is_larger(sum, best)) {
            best = sum;
            best_group = group;
        }
    }
    s.sigma[warp] = best;
    s.group[warp] = best_group;
    __syncthreads();
    if (thread != 0) return;
    for (int w = 1; w < kFinishThreads / kWarp; ++w) {
        if (is_larger(s.sigma[w], best) || (s.sigma[w] == best && s.group[w] < best_group)) {
            best = s.sigma[w];
            best_group = s.group[w];
        }
    }
    p.sigmas[piece.op] = static_cast<float>(sqrt(best));
    p.groups[piece.op] = best_group;
}

}  // namespace sn_fast
