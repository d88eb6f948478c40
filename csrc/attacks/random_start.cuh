// x + a random point of the ball. Every element is a function of the seed and its logical index, so that all layouts,
// and reference/random_start.py, get the same point. One launch; x is read once, the result written once.
//
// Elements 4q .. 4q + 3 of the batch are made of the four words that the counter q gives.
#pragma once

#include "attacks/random_start.h"
#include "attacks/samples.cuh"
#include "core/philox.cuh"
#include "core/reduce.cuh"

namespace sn_fast {

enum class Draw : std::uint32_t { kElements = 0, kRadius = 1 };  // third word of the counter

__device__ inline PhiloxCounter draw_bits(std::uint64_t seed, long long index, Draw draw) {
    const auto i = static_cast<std::uint64_t>(index);
    return philox(
        {{static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32), static_cast<std::uint32_t>(draw), 0u}},
        {{static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)}});
}

// In (0, 1].
__device__ inline float unit(std::uint32_t bits) { return fmaf(static_cast<float>(bits), 0x1p-32f, 0x1p-33f); }

// In [-1, 1].
__device__ inline float signed_unit(std::uint32_t bits) {
    return static_cast<float>(static_cast<std::int32_t>(bits)) * 0x1p-31f;
}

// Four elements. A density that depends on the norm alone gives a uniform direction: Gauss for l2, Laplace for l1.
struct Quad {
    float at[4];
};

template <Norm kNorm>
__device__ inline Quad draw_quad(std::uint64_t seed, long long quad) {
    const PhiloxCounter bits = draw_bits(seed, quad, Draw::kElements);
    Quad drawn;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const std::uint32_t word = bits.words[e];
        if (kNorm == Norm::kInf) drawn.at[e] = signed_unit(word);
        if (kNorm == Norm::kL1) {  // a sign and 31 bits
            const float exponential = -logf(unit(word << 1));
            drawn.at[e] = word >> 31 ? -exponential : exponential;
        }
        if (kNorm == Norm::kL2 && e % 2 == 0) {  // Box, Muller 1958
            const float radius = sqrtf(-2.0f * logf(unit(word)));
            float sine, cosine;
            sincospif(signed_unit(bits.words[e + 1]), &sine, &cosine);
            drawn.at[e] = radius * cosine;
            drawn.at[e + 1] = radius * sine;
        }
    }
    return drawn;
}

// Of a chunk in logical order, which starts at a multiple of 8 in the batch.
template <Norm kNorm>
__device__ inline Values draw_chunk(std::uint64_t seed, long long first) {
    Values drawn;
#pragma unroll
    for (int q = 0; q < kChunk / 4; ++q) {
        const Quad quad = draw_quad<kNorm>(seed, first / 4 + q);
#pragma unroll
        for (int e = 0; e < 4; ++e) drawn.at[4 * q + e] = quad.at[e];
    }
    return drawn;
}

// One element. 8 copies of its instructions in each kernel would cost much to compile.
template <Norm kNorm>
__device__ __noinline__ float draw_element(std::uint64_t seed, long long index) {
    const Quad quad = draw_quad<kNorm>(seed, index / 4);
    const int place = static_cast<int>(index % 4);
    return place == 0 ? quad.at[0] : place == 1 ? quad.at[1] : place == 2 ? quad.at[2] : quad.at[3];
}

template <Norm kNorm>
__device__ inline Values draw(const RandomStart& p, std::uint64_t seed, const Chunk& c) {
    if (p.logical.digits == 0) return draw_chunk<kNorm>(seed, c.sample * p.samples.size + c.first);
    Values drawn = {};
#pragma unroll
    for (int e = 0; e < kChunk; ++e)
        if (e >= c.begin && e < c.end)
            drawn.at[e] = draw_element<kNorm>(seed, c.sample * p.samples.size + p.logical.of(c.first + e));
    return drawn;
}

// x + scale * drawn, in the box that holds the ball (any of the balls: rounding must not leave it), clipped, written.
__device__ inline void start_chunk(const RandomStart& p, const Chunk& c, const Raw& raw, const Values& drawn,
                                   float scale) {
    Values z = decode(raw, p.x.dtype);
    const float eps = p.eps.of(c.sample);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
        const float x = z.at[e];
        z.at[e] = clamp(x + scale * drawn.at[e], x - eps, x + eps);
    }
    clip(z, p.lower, p.upper, c);
    store(p.out, c, encode(z, p.out.dtype));
}

// inf: a thread per chunk.
__global__ void __launch_bounds__(kChunkThreads) random_start_inf(RandomStart p) {
    // 1) Read before drawing: x arrives meanwhile.
    const Chunk c = chunk_of_thread(p.samples);
    if (c.sample == p.samples.count) return;
    const Raw raw = load(p.x, c);
    // 2) Draw, move, write.
    start_chunk(p, c, raw, draw<Norm::kInf>(p, *p.seed, c), p.eps.of(c.sample));
}

struct RandomStartBlock {
    double sums[kChunkThreads / kWarp];
};

// 2 and 1: a block per sample. Its point is kept in shared memory, or where it does not fit drawn twice.
template <Norm kNorm>
__global__ void __launch_bounds__(kChunkThreads) random_start_sample(RandomStart p) {
    RandomStartBlock& shared = shared_memory<RandomStartBlock>();
    Values* const point = reinterpret_cast<Values*>(&shared + 1);  // its chunks in logical order
    const long long sample = blockIdx.x, size = p.samples.size;
    const std::uint64_t seed = *p.seed;
    // 1) The norm of the point drawn, summed in logical order: the same bits for every layout.
    double sum = 0.0;
    for (long long k = threadIdx.x; k < p.samples.chunks; k += kChunkThreads) {
        const Chunk c = chunk_at(p.samples, sample, k);
        const Values drawn = draw_chunk<kNorm>(seed, sample * size + c.first);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
            if (e < c.begin || e >= c.end) continue;
            const double value = drawn.at[e];
            sum += kNorm == Norm::kL2 ? value * value : fabs(value);
        }
        if (p.keeps_point) point[k] = drawn;
    }
    sum = block_reduce(sum, Add{}, shared.sums);
    const double norm = kNorm == Norm::kL2 ? sqrt(sum) : sum;
    // 2) The volume inside radius r is r^D: a radius drawn as r itself would pile up at the centre.
    const float volume = unit(draw_bits(seed, sample, Draw::kRadius).words[0]);
    const float radius = expf(logf(volume) / static_cast<float>(size));
    const float scale = norm > 0.0 ? static_cast<float>(p.eps.of(sample) * radius / norm) : 0.0f;
    // 3) The same point, scaled.
    for (long long k = threadIdx.x; k < p.samples.chunks; k += kChunkThreads) {
        const Chunk c = chunk_at(p.samples, sample, k);
        const Raw raw = load(p.x, c);
        Values drawn = {};
        if (!p.keeps_point) {
            drawn = draw<kNorm>(p, seed, c);
        } else if (p.logical.digits == 0) {
            drawn = point[k];
        } else {
            const long long before = k * kChunk - c.first;  // places of the first chunk that belong to another sample
            const auto* elements = reinterpret_cast<const float*>(point) + before;
#pragma unroll
            for (int e = 0; e < kChunk; ++e)
                if (e >= c.begin && e < c.end) drawn.at[e] = elements[p.logical.of(c.first + e)];
        }
        start_chunk(p, c, raw, drawn, scale);
    }
}

}  // namespace sn_fast
