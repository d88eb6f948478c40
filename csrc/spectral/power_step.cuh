// The kernel that ends a power iteration.
#pragma once

#include "spectral/tile.cuh"

namespace sn_fast {

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
        if (is_larger(s.sigma[w], best) || (!is_larger(best, s.sigma[w]) && s.group[w] < best_group)) {
            best = s.sigma[w];
            best_group = s.group[w];
        }
    }
    p.sigmas[piece.op] = static_cast<float>(sqrt(best));
    p.groups[piece.op] = best_group;
}

}  // namespace sn_fast
