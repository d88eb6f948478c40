// 2 and 1 where a block's registers hold the sample: it is read once, and stays with the threads that read it.
#pragma once

#include "attacks/pgd_step.cuh"

namespace sn_fast {

constexpr int kHeldChunks = 3;     // of one thread: its loads are all under way together
constexpr int kHeldThreads = 256;  // two such blocks fit on a multiprocessor, and four of a 3 x 32 x 32 sample

template <Norm kNorm>
__global__ void __launch_bounds__(kHeldThreads) pgd_step_held(PgdStep p) {
    SampleBlock& shared = shared_memory<SampleBlock>();
    const long long sample = blockIdx.x;
    const bool moves = p.grad.address != nullptr;
    if (is_inactive(p, sample)) return copy_sample(p, sample);
    // 1) Read before use. What does not exist is 0.
    Raw start[kHeldChunks], centre[kHeldChunks], gradient[kHeldChunks];
#pragma unroll
    for (int i = 0; i < kHeldChunks; ++i) {
        const long long k = threadIdx.x + static_cast<long long>(i) * blockDim.x;
        start[i] = centre[i] = gradient[i] = Raw{};
        if (k >= p.samples.chunks) continue;
        const Chunk c = chunk_at(p.samples, sample, k);
        start[i] = load(p.x_adv, c);
        if (p.ball) centre[i] = load(p.x, c);
        if (moves) gradient[i] = load(p.grad, c);
    }
    const auto values = [&](int i) { return decode(start[i], p.x_adv.dtype); };
    const auto centres = [&](int i) { return decode(centre[i], p.x.dtype); };
    const auto gradients = [&](int i) { return decode_gradient(gradient[i], p.grad.dtype); };
    // 2) Sums, and from them the step and the part that stays.
    Direction direction;
    float weight = 1.0f;
    const float alpha = signed_alpha(p, sample), eps = p.eps.of(sample);
    if (kNorm == Norm::kL2) {
        double sums[kSums] = {};
#pragma unroll
        for (int i = 0; i < kHeldChunks; ++i) add_products(sums, values(i), centres(i), gradients(i));
        block_reduce(sums, Add{}, shared.sums);
        if (moves) direction = direction_of(sqrt(sums[0]), alpha);
        if (p.ball) weight = weight_of(moved_distance(sums, direction), eps);
    } else {
        double sum = 0.0;
#pragma unroll
        for (int i = 0; i < kHeldChunks; ++i) {
            const Values g = gradients(i);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) sum += fabsf(g.at[e]);
        }
        if (moves) direction = direction_of(block_reduce(sum, Add{}, shared.sums), alpha);
        sum = 0.0;
#pragma unroll
        for (int i = 0; i < kHeldChunks; ++i) {
            Values z = values(i);
            const Values x = centres(i);
            if (moves) move<kNorm>(z, gradients(i), direction);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) sum += fabsf(z.at[e] - x.at[e]);
        }
        if (p.ball) weight = weight_of(block_reduce(sum, Add{}, shared.sums), eps);
    }
    // 3) Move, project, clip, round, write.
#pragma unroll
    for (int i = 0; i < kHeldChunks; ++i) {
        const long long k = threadIdx.x + static_cast<long long>(i) * blockDim.x;
        if (k >= p.samples.chunks) continue;
        Values z = values(i);
        if (moves) move<kNorm>(z, gradients(i), direction);
        scale_into_ball(z, centres(i), weight);
        finish(p, chunk_at(p.samples, sample, k), z);
    }
}

}  // namespace sn_fast
