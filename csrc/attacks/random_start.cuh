// x + a random point of the ball. Every element is a function of the seed and its logical index, so that all layouts,
// and reference/random_start.py, get the same point. One launch; x is read once, the result written once.
#pragma once

#include "attacks/random_start.h"
#include "attacks/samples.cuh"
#include "core/philox.cuh"
#include "core/reduce.cuh"

namespace sn_fast {

enum class Draw : std::uint32_t { kElement = 0, kRadius = 1 };  // third word of the counter

__device__ inline PhiloxCounter draw_bits(std::uint64_t seed, long long index, Draw draw) {
    const auto i = static_cast<std::uint64_t>(index);
    return philox({{static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32),
                    static_cast<std::uint32_t>(draw), 0u}},
                  {{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}});
}

// In (0, 1].
__device__ inline float unit(std::uint32_t bits) { return fmaf(static_cast<float>(bits), 0x1p-32f, 0x1p-33f); }

// In [-1, 1].
__device__ inline float signed_unit(std::uint32_t bits) {
    return static_cast<float>(static_cast<std::int32_t>(bits)) * 0x1p-31f;
}

// One element. A density that depends on the norm alone gives a uniform direction: Gauss for l2, Laplace for l1.
// A call costs little beside its 150 instructions; 8 copies of them in each kernel cost much to compile.
template <Norm kNorm>
__device__ __noinline__ float draw_element(std::uint64_t seed, long long index) {
    const PhiloxCounter bits = draw_bits(seed, index, Draw::kElement);
    if (kNorm == Norm::kInf) return signed_unit(bits.words[0]);
    const float exponential = -logf(unit(bits.words[0]));
    if (kNorm == Norm::kL1) return bits.words[1] >> 31 ? -exponential : exponential;
    return sqrtf(2.0f * exponential) * cospif(signed_unit(bits.words[1]));  // Box, Muller 1958
}

template <Norm kNorm>
__device__ inline void start_chunk(const RandomStart& p, std::uint64_t seed, const Chunk& c, float scale) {
    Values z = decode(load(p.x, c), p.x.dtype);
    const float eps = p.eps.of(c.sample);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
        if (e < c.begin || e >= c.end) continue;
        const long long index = c.sample * p.samples.size + p.logical.of(c.first + e);
        const float x = z.at[e], moved = x + scale * draw_element<kNorm>(seed, index);
        z.at[e] = clamp(moved, x - eps, x + eps);  // any of the balls lies in this box; rounding must not leave it
    }
    clip(z, p.lower, p.upper, c);
    store(p.out, c, encode(z, p.out.dtype));
}

// inf: a thread per chunk.
__global__ void __launch_bounds__(kChunkThreads) random_start_inf(RandomStart p) {
    const Chunk c = chunk_of_thread(p.samples);
    if (c.sample == p.samples.count) return;
    start_chunk<Norm::kInf>(p, *p.seed, c, p.eps.of(c.sample));
}

struct RandomStartBlock {
    double sums[kChunkThreads / kWarp];
};

// 2 and 1: a block per sample. The point is drawn twice, which is cheaper than keeping it.
template <Norm kNorm>
__global__ void __launch_bounds__(kChunkThreads) random_start_sample(RandomStart p) {
    RandomStartBlock& shared = shared_memory<RandomStartBlock>();
    const long long sample = blockIdx.x;
    const std::uint64_t seed = *p.seed;
    // 1) The norm of the point drawn, summed in logical order: the same bits for every layout.
    double sum = 0.0;
    for (long long i = threadIdx.x; i < p.samples.size; i += kChunkThreads) {
        const double drawn = draw_element<kNorm>(seed, sample * p.samples.size + i);
        sum += kNorm == Norm::kL2 ? drawn * drawn : fabs(drawn);
    }
    sum = block_reduce(sum, Add{}, shared.sums);
    const double norm = kNorm == Norm::kL2 ? sqrt(sum) : sum;
    // 2) The volume inside radius r is r^D: a radius drawn as r itself would pile up at the centre.
    const float volume = unit(draw_bits(seed, sample, Draw::kRadius).words[0]);
    const float radius = expf(logf(volume) / static_cast<float>(p.samples.size));
    const float scale = norm > 0.0 ? static_cast<float>(p.eps.of(sample) * radius / norm) : 0.0f;
    // 3) The same point again, scaled.
    for (long long k = threadIdx.x; k < p.samples.chunks; k += kChunkThreads)
        start_chunk<kNorm>(p, seed, chunk_at(p.samples, sample, k), scale);
}

}  // namespace sn_fast
