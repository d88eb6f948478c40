// A 1-exact step within a clip: the elements of largest |g| that have room go to their bounds, until alpha is spent.
//
// The ball then takes from the other elements alone; where the full ones exceed eps by themselves, they are filled from
// x until eps is spent, and the others are back at x. So the iterates of a linear loss stop at its maximum over ball
// and clip (reference/l1_fill.py: fill_steepest).
#pragma once

#include "attacks/l1_fill.cuh"
#include "attacks/pgd_step.cuh"

namespace sn_fast {

// One element, and where its gradient takes it.
struct Climber {
    float z, x;
    float bound;  // infinite: none
    bool up;
    unsigned size;  // bits of |g|; 0: it does not move

    // How far it can go from `from`, at most `limit`.
    __device__ float room(float from, float limit) const {
        return fminf(fmaxf(up ? bound - from : from - bound, 0.0f), limit);
    }

    __device__ float filled(const Fill& fill, float from, float limit) const {
        if (size == 0) return from;
        if (fill.is_full(size)) return bound;
        const float step = static_cast<float>(fill.step(size, room(from, limit)));
        return step == 0.0f ? from : up ? from + step : from - step;
    }

    __device__ double held() const { return fabs(static_cast<double>(bound) - x); }
};

template <bool kResident>
__global__ void __launch_bounds__(kMaxThreads, 1) pgd_step_l1_clip(PgdStep p) {
    SampleBlock& shared = shared_memory<SampleBlock>();
    const long long sample = blockIdx.x, chunks = p.samples.chunks;
    // 1) Read the sample, once if it stays on chip.
    if (is_inactive(p, sample)) return copy_sample(p, sample);
    const Sample<kResident> held(p, shared);
    const auto climber = [&](float z, float x, float g, float low, float high) {
        const bool up = (g > 0.0f) != p.targeted, moves = g != 0.0f && z == z && x == x;
        return Climber{z, x, up ? high : low, up, moves ? float_as_bits(fabsf(g)) : 0u};
    };
    const auto of_chunk = [&](const Chunk& c, long long k, const auto& body) {
        const Values z = held.x_adv(c, k), x = p.ball ? held.x(c, k) : z, g = held.g(c, k);
        const Values low = load_bound(p.lower, c, -INFINITY), high = load_bound(p.upper, c, INFINITY);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) body(climber(z.at[e], x.at[e], g.at[e], low.at[e], high.at[e]), e);
    };
    const auto visit = [&](const auto& body) {
        for (long long k = threadIdx.x; k < chunks; k += blockDim.x)
            of_chunk(chunk_at(p.samples, sample, k), k, [&](const Climber& one, int) { body(one); });
    };
    // 2) Fill the steepest elements from where they are.
    unsigned long long top = 0;
    visit([&](const Climber& one) { top = one.size > top ? one.size : top; });
    top = block_reduce(top, Larger{}, shared.largest);
    const unsigned largest = static_cast<unsigned>(top);
    const float alpha = p.alpha.of(sample);
    const auto rooms = [&](const auto& body) {
        visit([&](const Climber& one) {
            if (one.size) body(one.size, one.room(one.z, alpha));
        });
    };
    const Fill fill = fill_steepest(rooms, alpha, largest, shared.sums, shared.largest);
    // 3) What the ball leaves to the others; or, where the full ones exceed it, how far they are filled from x.
    Fill from_x;
    bool exceeds = false;
    double threshold = 0.0;
    const float eps = p.eps.of(sample);
    if (p.ball) {
        double sums[2] = {}, farthest = 0.0;
        visit([&](const Climber& one) {
            if (fill.is_full(one.size)) {
                sums[0] += one.held();
            } else {
                const double delta = fabsf(one.filled(fill, one.z, alpha) - one.x);
                sums[1] += delta;
                farthest = fmax(farthest, delta);
            }
        });
        block_reduce(sums, Add{}, shared.sums);
        exceeds = sums[0] > eps;
        if (exceeds) {
            const auto rooms_of_full = [&](const auto& body) {
                visit([&](const Climber& one) {
                    if (fill.is_full(one.size)) body(one.size, one.room(one.x, eps));
                });
            };
            from_x = fill_steepest(rooms_of_full, eps, largest, shared.sums, shared.largest);
        } else if (sums[0] + sums[1] > eps) {
            farthest = block_reduce(farthest, Larger{}, shared.sums);
            const auto magnitudes = [&](const auto& body) {
                visit([&](const Climber& one) {
                    if (fill.is_full(one.size)) return;
                    body(static_cast<double>(fabsf(one.filled(fill, one.z, alpha) - one.x)));
                });
            };
            const double count = static_cast<double>(p.samples.size);
            threshold = l1_threshold(magnitudes, eps - sums[0], sums[1], count, farthest, shared.sums);
        }
    }
    // 4) Move, project, clip, round, write.
    for (long long k = threadIdx.x; k < chunks; k += blockDim.x) {
        const Chunk c = chunk_at(p.samples, sample, k);
        Values moved;
        of_chunk(c, k, [&](const Climber& one, int e) {
            const bool full = fill.is_full(one.size);
            float z;
            if (exceeds)
                z = full ? one.filled(from_x, one.x, eps) : one.x;
            else
                z = one.filled(fill, one.z, alpha);
            moved.at[e] = full || !(threshold > 0.0) ? z : shrunk(z, one.x, threshold);
        });
        finish(p, c, moved);
    }
}

}  // namespace sn_fast
