// The kernel that ends a power iteration.
#pragma once

#include <climits>

#include "spectral/power_step.h"
#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kFinishThreads = 256;
constexpr int kFinishLoads = 8;  // of a thread, all under way together: a slice has 2048 elements at most

struct FinishParams {
    const VectorSlice* slices;
    float* results[2];
    const double* norms[2];
    float* sigmas;
    std::int64_t* groups;
    const Targets* targets;  // null: results stay where they are; else they go to `given`, and sigma and group to these
    const std::int32_t* changes;  // null: all have
    Copies copies;
    float* given[2][kMaxOperators];
};

static_assert(sizeof(FinishParams) <= 4096, "kernel parameters");

// A group and its square sum.
struct Candidate {
    double sum;
    int group;
};

struct FinishShared {
    Candidate best[kFinishThreads / kWarp];
};

// The one with the larger sum, NaN being the largest; of equal ones the first group.
__device__ inline Candidate larger(const Candidate& a, const Candidate& b) {
    const bool a_is_nan = a.sum != a.sum, b_is_nan = b.sum != b.sum;
    if (a_is_nan != b_is_nan) return a_is_nan ? a : b;
    if (a_is_nan || a.sum == b.sum) return a.group < b.group ? a : b;
    return a.sum > b.sum ? a : b;
}

// sigma and group, from where they are kept.
__device__ inline void copy_scalars(const FinishParams& p, int op) {
    const Targets& target = p.targets[op];
    if (p.copies.sigmas) p.copies.sigmas[op] = *target.sigma;
    if (p.copies.groups && target.group) p.copies.groups[op] = *target.group;
}

// Normalises one slice of a vector, or finds sigma and its group.
__global__ void __launch_bounds__(kFinishThreads) power_step_finish(FinishParams p) {
    const VectorSlice slice = p.slices[blockIdx.x];
    wait_for_previous();
    const int thread = static_cast<int>(threadIdx.x);
    const double* norms = p.norms[slice.second] + slice.norm;
    const bool changed = !p.changes || p.changes[slice.op] != 0;
    if (slice.length > 0) {
        // 1) A slice of one group: scaled, or as given where its norm is zero or not finite.
        const Scale scale = changed ? inverse_norm(sum_partials(norms, slice.norms)) : Scale{1.0f, 1.0f, false};
        float* result = p.results[slice.second] + slice.output + slice.first;
        float* given = p.given[slice.second][slice.op] + slice.first;
        float* target = p.targets ? given : result;
        float* copy = p.copies.vectors[slice.second];
        if (copy) copy += slice.output + slice.first;
        if (!changed && !copy) return;
        float values[kFinishLoads];
        const float* from = scale.alive ? result : given;
#pragma unroll
        for (int i = 0; i < kFinishLoads; ++i)
            values[i] = thread + i * kFinishThreads < slice.length ? from[thread + i * kFinishThreads] : 0.0f;
#pragma unroll
        for (int i = 0; i < kFinishLoads; ++i) {
            const int at = thread + i * kFinishThreads;
            const float value = values[i] * scale.first * scale.second;
            if (at < slice.length && changed) target[at] = value;
            if (at < slice.length && copy) copy[at] = value;
        }
        return;
    }
    if (!changed) {
        if (thread == 0) copy_scalars(p, slice.op);
        return;
    }
    // 2) The largest norm over the groups: a thread sums up a group if its partial sums are few, else a warp.
    FinishShared& s = shared_memory<FinishShared>();
    Candidate best{-1.0, INT_MAX};
    if (slice.norms < kWarp) {
        for (int group = thread; group < slice.groups; group += kFinishThreads) {
            double sum = 0.0;
            for (int i = 0; i < slice.norms; ++i) sum += norms[group * slice.norms + i];
            best = larger(best, {sum, group});
        }
    } else {
        for (int group = thread / kWarp; group < slice.groups; group += kFinishThreads / kWarp)
            best = larger(best, {sum_partials(norms + group * slice.norms, slice.norms), group});
    }
    for (int step = kWarp / 2; step > 0; step /= 2)
        best = larger(best, {__shfl_xor_sync(kAllLanes, best.sum, step), __shfl_xor_sync(kAllLanes, best.group, step)});
    if (thread % kWarp == 0) s.best[thread / kWarp] = best;
    __syncthreads();
    if (thread != 0) return;
    for (int w = 1; w < kFinishThreads / kWarp; ++w) best = larger(best, s.best[w]);
    const auto sigma = static_cast<float>(sqrt(best.sum));
    if (p.targets) {
        const Targets& target = p.targets[slice.op];
        *target.sigma = sigma;
        if (target.group) *target.group = best.group;
        copy_scalars(p, slice.op);
    } else {
        p.sigmas[slice.op] = sigma;
        p.groups[slice.op] = best.group;
    }
}

}  // namespace sn_fast
