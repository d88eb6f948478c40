// x_adv + alpha * direction of the gradient, brought into the ball around x, then clipped.
//
// Passes over full-size tensors (without a full-size clip; a projection has no gradient to read, and an infinite ball
// no x):
//   inf                 one launch, 4      a thread per chunk
//   2, 1, 1-exact       one launch, 4      a block per sample, which is held in shared memory
//   2, larger samples   two launches, 7    |d + s g|^2 = |d|^2 + 2 s <d, g> + s^2 |g|^2, with d = x_adv - x
//   1, larger samples   three launches, 8  |d + s g|_1 has no such identity
//   1-exact, larger     one launch, a block per sample, which is read again for each pass over it
//   1-exact with a clip one launch, as above (l1_clip_step.cuh)
// Sums are of float64, in which the square of every float32 is a normal number: no scaling by max|g| is needed.
#pragma once

#include "attacks/chunk_step.cuh"
#include "attacks/l1_threshold.cuh"
#include "core/copy_async.cuh"

namespace sn_fast {

// Of a block per sample, at most. Fewer threads with more chunks each leave room for more blocks on a multiprocessor: one
// waits for memory while others compute.
constexpr int kMaxThreads = 512;

__device__ inline float signed_alpha(const PgdStep& p, long long sample) {
    const float alpha = p.alpha.of(sample);
    return p.targeted ? -alpha : alpha;
}

__device__ inline void finish(const PgdStep& p, const Chunk& c, Values z) {
    clip(z, p.lower, p.upper, c);
    store(p.out, c, encode(z, p.out.dtype));
}

__device__ inline bool is_inactive(const PgdStep& p, long long sample) { return p.active && !p.active[sample]; }

// sign(g) * alpha, with 0 for the sign of what is not finite: of the bits without the sign, zero is 0 and all that is not
// finite lies from 0x7f800000 upwards, so that one unsigned comparison finds both.
__device__ inline float signed_step(float g, float alpha) {
    const unsigned bits = float_as_bits(g);
    const float step = bits_as_float(float_as_bits(alpha) ^ (bits & 0x80000000u));
    return (bits & 0x7fffffffu) - 1u < 0x7f7fffffu ? step : 0.0f;
}

// -- inf: a thread per chunk ------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kChunkThreads) pgd_step_inf(PgdStep p) {
    // 1) This thread's chunk: everything is read before anything is used.
    const Chunk c = chunk_of_thread(p.samples);
    if (c.sample == p.samples.count) return;
    const Raw start = load(p.x_adv, c);
    if (is_inactive(p, c.sample)) return store(p.out, c, start);
    const Raw centre = p.ball ? load(p.x, c) : Raw{};
    const Raw gradient = p.grad.address ? load(p.grad, c) : Raw{};
    Values z = decode(start, p.x_adv.dtype);
    // 2) Along the sign of the gradient.
    if (p.grad.address) {
        const Values g = decode(gradient, p.grad.dtype);
        const float alpha = signed_alpha(p, c.sample);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) z.at[e] += signed_step(g.at[e], alpha);
    }
    // 3) Into the ball.
    if (p.ball) {
        const Values x = decode(centre, p.x.dtype);
        const float eps = p.eps.of(c.sample);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) z.at[e] = clamp(z.at[e], x.at[e] - eps, x.at[e] + eps);
    }
    // 4) Clip, round, write.
    finish(p, c, z);
}

// -- a block per sample -----------------------------------------------------------------------------------------------

struct SampleBlock {
    double sums[4 * kMaxThreads / kWarp];
    unsigned long long largest[kMaxThreads / kWarp];
};

// How many 16-byte words a chunk takes.
__host__ __device__ inline int words_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 2 : 1; }

// A sample on chip: every thread keeps its own chunks there, so no barrier is needed.
struct Resident {
    uint4* words;
    long long chunks;

    // Whole chunks are there after wait_for_all_copies.
    __device__ void fill(const Elements& t, const Chunk& c, long long index) {
        if (c.whole() && t.vector) {
            const uint4* from = reinterpret_cast<const uint4*>(address_of(t, c));
            copy_async(words + index, from);
            if (is_wide(t.dtype)) copy_async(words + chunks + index, from + 1);
            return;
        }
        const Raw raw = load(t, c);
        words[index] = get_words(raw, 0);
        if (is_wide(t.dtype)) words[chunks + index] = get_words(raw, 4);
    }

    __device__ Raw get(Dtype dtype, long long index) const {
        Raw raw = {};
        set_words(raw, 0, words[index]);
        if (is_wide(dtype)) set_words(raw, 4, words[chunks + index]);
        return raw;
    }
};

// One sample's tensors: read when they are used, or once if they stay on chip.
template <bool kResident>
struct Sample {
    const PgdStep& p;
    long long index;
    Resident start, centre, gradient;

    __device__ Sample(const PgdStep& p, SampleBlock& shared) : p(p), index(blockIdx.x) {
        const long long chunks = p.samples.chunks;
        start = {reinterpret_cast<uint4*>(&shared + 1), chunks};
        centre = {start.words + chunks * words_of(p.x_adv.dtype), chunks};
        gradient = {centre.words + (p.ball ? chunks * words_of(p.x.dtype) : 0), chunks};
        if (!kResident) return;
        for (long long k = threadIdx.x; k < chunks; k += blockDim.x) {
            const Chunk c = chunk_at(p.samples, index, k);
            start.fill(p.x_adv, c, k);
            if (p.ball) centre.fill(p.x, c, k);
            if (p.grad.address) gradient.fill(p.grad, c, k);
        }
        wait_for_all_copies();
    }

    __device__ Values x_adv(const Chunk& c, long long k) const {
        return decode(read(p.x_adv, start, c, k), p.x_adv.dtype);
    }

    __device__ Values x(const Chunk& c, long long k) const { return decode(read(p.x, centre, c, k), p.x.dtype); }

    __device__ Values g(const Chunk& c, long long k) const {
        return decode_gradient(read(p.grad, gradient, c, k), p.grad.dtype);
    }

private:
    __device__ static Raw read(const Elements& t, const Resident& on_chip, const Chunk& c, long long k) {
        return kResident ? on_chip.get(t.dtype, k) : load(t, c);
    }
};

// A sample that is not active is copied.
__device__ inline void copy_sample(const PgdStep& p, long long sample) {
    for (long long k = threadIdx.x; k < p.samples.chunks; k += blockDim.x) {
        const Chunk c = chunk_at(p.samples, sample, k);
        store(p.out, c, load(p.x_adv, c));
    }
}

// (|g|, how many have it) as one number that compares by |g|.
struct LargestCount {
    __device__ static unsigned long long one(float g) {
        return (static_cast<unsigned long long>(float_as_bits(fabsf(g))) << 32) + 1;
    }

    __device__ unsigned long long operator()(unsigned long long a, unsigned long long b) const {
        if (a >> 32 == b >> 32) return a + (b & 0xffffffffu);
        return a > b ? a : b;
    }
};

// L2: |g|^2, <d, g>, |d|^2 with d = x_adv - x. A product of two float32 is exact in float64.
__device__ inline void add_products(double (&sums)[kSums], const Values& z, const Values& x, const Values& g) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
        const double ge = g.at[e], d = z.at[e] - x.at[e];
        sums[0] += ge * ge;
        sums[1] += d * ge;
        sums[2] += d * d;
    }
}

// L2: |d + s g|, from these sums.
__device__ inline double moved_distance(const double (&sums)[kSums], const Direction& direction) {
    const double s = direction.factor();
    return sqrt(fmax(sums[2] + 2.0 * s * sums[1] + s * s * sums[0], 0.0));
}

// L2, on chip.
__global__ void __launch_bounds__(kMaxThreads, 1) pgd_step_l2_sample(PgdStep p) {
    SampleBlock& shared = shared_memory<SampleBlock>();
    const long long sample = blockIdx.x, chunks = p.samples.chunks;
    const bool moves = p.grad.address != nullptr;
    // 1) Read the sample.
    if (is_inactive(p, sample)) return copy_sample(p, sample);
    const Sample<true> held(p, shared);
    // 2) Three sums: the step and the distance after it follow from them.
    double sums[kSums] = {};
    for (long long k = threadIdx.x; k < chunks; k += blockDim.x) {
        const Chunk c = chunk_at(p.samples, sample, k);
        const Values z = held.x_adv(c, k);
        add_products(sums, z, p.ball ? held.x(c, k) : z, moves ? held.g(c, k) : Values{});
    }
    block_reduce(sums, Add{}, shared.sums);
    Direction direction;
    if (moves) direction = direction_of(sqrt(sums[0]), signed_alpha(p, sample));
    const float weight = p.ball ? weight_of(moved_distance(sums, direction), p.eps.of(sample)) : 1.0f;
    // 3) Move, project, clip, round, write.
    for (long long k = threadIdx.x; k < chunks; k += blockDim.x) {
        const Chunk c = chunk_at(p.samples, sample, k);
        Values z = held.x_adv(c, k);
        if (moves) move<Norm::kL2>(z, held.g(c, k), direction);
        if (weight != 1.0f) scale_into_ball(z, held.x(c, k), weight);
        finish(p, c, z);
    }
}

// 1, on chip; 1-exact without a clip, on chip or not.
template <Norm kNorm, bool kResident>
__global__ void __launch_bounds__(kMaxThreads, 1) pgd_step_sample(PgdStep p) {
    SampleBlock& shared = shared_memory<SampleBlock>();
    const long long sample = blockIdx.x, chunks = p.samples.chunks, step = blockDim.x;
    const bool moves = p.grad.address != nullptr;
    // 1) Read the sample, once if it stays on chip.
    if (is_inactive(p, sample)) return copy_sample(p, sample);
    const Sample<kResident> held(p, shared);
    // 2) The gradient's norm; 1-exact: its largest magnitude, and how many elements have it.
    Direction direction;
    if (moves) {
        double sum = 0.0;
        unsigned long long largest = 0;
        for (long long k = threadIdx.x; k < chunks; k += step) {
            const Chunk c = chunk_at(p.samples, sample, k);
            const Values g = held.g(c, k);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) {
                if (kNorm != Norm::kL1Exact)
                    sum += power<kNorm>(g.at[e]);
                else if (g.at[e] != 0.0f)
                    largest = LargestCount{}(largest, LargestCount::one(g.at[e]));
            }
        }
        const float alpha = signed_alpha(p, sample);
        if (kNorm == Norm::kL1Exact) {
            largest = block_reduce(largest, LargestCount{}, shared.largest);
            direction.largest = bits_as_float(static_cast<unsigned>(largest >> 32));
            direction.length = largest ? alpha / static_cast<float>(largest & 0xffffffffu) : 0.0f;
        } else {
            direction = direction_of(root<kNorm>(block_reduce(sum, Add{}, shared.sums)), alpha);
        }
    }
    // z = x_adv + step, of one chunk.
    const auto moved = [&](const Chunk& c, long long k) {
        Values z = held.x_adv(c, k);
        if (moves) move<kNorm>(z, held.g(c, k), direction);
        return z;
    };
    // 3) Its distance from x, and from it the projection: a weight, or for 1-exact a threshold.
    float weight = 1.0f;
    double threshold = 0.0;
    const float eps = p.eps.of(sample);
    if (p.ball) {
        const auto visit = [&](const auto& body) {
            for (long long k = threadIdx.x; k < chunks; k += step) {
                const Chunk c = chunk_at(p.samples, sample, k);
                const Values z = moved(c, k), x = held.x(c, k);
#pragma unroll
                for (int e = 0; e < kChunk; ++e) body(z.at[e] - x.at[e]);
            }
        };
        double sum = 0.0, largest = 0.0;
        visit([&](float delta) {
            sum += power<kNorm>(delta);
            if (kNorm == Norm::kL1Exact) largest = fmax(largest, static_cast<double>(fabsf(delta)));
        });
        const double distance = root<kNorm>(block_reduce(sum, Add{}, shared.sums));
        if (kNorm != Norm::kL1Exact) {
            weight = weight_of(distance, eps);
        } else if (distance > eps) {
            largest = block_reduce(largest, [](double a, double b) { return fmax(a, b); }, shared.sums);
            const auto magnitudes = [&](const auto& body) {
                visit([&](float delta) { body(static_cast<double>(fabsf(delta))); });
            };
            const double count = static_cast<double>(p.samples.size);
            threshold = l1_threshold(magnitudes, eps, distance, count, largest, shared.sums);
        }
    }
    // 4) Project, clip, round, write.
    for (long long k = threadIdx.x; k < chunks; k += step) {
        const Chunk c = chunk_at(p.samples, sample, k);
        Values z = moved(c, k);
        if (kNorm == Norm::kL1Exact ? threshold > 0.0 : weight != 1.0f) {
            const Values x = held.x(c, k);
            if (kNorm == Norm::kL1Exact)
                shrink_into_ball(z, x, threshold);
            else
                scale_into_ball(z, x, weight);
        }
        finish(p, c, z);
    }
}

// -- samples in tiles: partial sums, then the update ------------------------------------------------------------------

struct TileBlock {
    double sums[kSums * kChunkThreads / kWarp];
};

struct Tile {
    long long sample, first, last;
    double* partials;  // of the sample
    long long index;
};

__device__ inline Tile tile_of_block(const PgdStep& p) {
    const long long sample = blockIdx.x / p.tiles, index = blockIdx.x - sample * p.tiles;
    const long long first = index * p.chunks_per_tile, end = first + p.chunks_per_tile;
    const long long last = end < p.samples.chunks ? end : p.samples.chunks;
    return {sample, first, last, p.partials + sample * p.tiles * kSums, index};
}

// One of the sample's sums over its tiles, in fixed order, in every thread.
__device__ inline double total(const PgdStep& p, const Tile& tile, int which, TileBlock& shared) {
    double sum = 0.0;
    for (long long i = threadIdx.x; i < p.tiles; i += kChunkThreads) sum += tile.partials[i * kSums + which];
    return block_reduce(sum, Add{}, shared.sums);
}

// All of them. Those that no launch before this one has left are not used.
__device__ inline void totals(const PgdStep& p, const Tile& tile, double (&sums)[kSums], TileBlock& shared) {
    for (long long i = threadIdx.x; i < p.tiles; i += kChunkThreads)
        for (int which = 0; which < kSums; ++which) sums[which] += tile.partials[i * kSums + which];
    block_reduce(sums, Add{}, shared.sums);
}

__device__ inline void leave(const Tile& tile, int which, double sum, TileBlock& shared) {
    sum = block_reduce(sum, Add{}, shared.sums);
    if (threadIdx.x == 0) tile.partials[tile.index * kSums + which] = sum;
}

// L2: |g|^2, <d, g>, |d|^2.
__global__ void __launch_bounds__(kChunkThreads) pgd_step_l2_sums(PgdStep p) {
    TileBlock& shared = shared_memory<TileBlock>();
    const Tile tile = tile_of_block(p);
    if (is_inactive(p, tile.sample)) return;
    double sums[kSums] = {};
    for (long long k = tile.first + threadIdx.x; k < tile.last; k += kChunkThreads) {
        // 1) Read before use.
        const Chunk c = chunk_at(p.samples, tile.sample, k);
        const Raw gradient = p.grad.address ? load(p.grad, c) : Raw{};
        const Raw start = p.ball ? load(p.x_adv, c) : Raw{}, centre = p.ball ? load(p.x, c) : Raw{};
        // 2) Add up.
        const Values g = decode_gradient(gradient, p.grad.dtype);
        add_products(sums, decode(start, p.x_adv.dtype), decode(centre, p.x.dtype), g);
    }
    // 3) One number each per tile.
    block_reduce(sums, Add{}, shared.sums);
    if (threadIdx.x == 0)
        for (int i = 0; i < kSums; ++i) tile.partials[tile.index * kSums + i] = sums[i];
}

// L1, first launch: |g|_1.
__global__ void __launch_bounds__(kChunkThreads) pgd_step_l1_gradient(PgdStep p) {
    TileBlock& shared = shared_memory<TileBlock>();
    const Tile tile = tile_of_block(p);
    if (is_inactive(p, tile.sample)) return;
    double sum = 0.0;
    for (long long k = tile.first + threadIdx.x; k < tile.last; k += kChunkThreads) {
        const Values g = decode_gradient(load(p.grad, chunk_at(p.samples, tile.sample, k)), p.grad.dtype);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) sum += fabsf(g.at[e]);
    }
    leave(tile, 0, sum, shared);
}

// L1, second launch: |x_adv + step - x|_1.
__global__ void __launch_bounds__(kChunkThreads) pgd_step_l1_distance(PgdStep p) {
    TileBlock& shared = shared_memory<TileBlock>();
    const Tile tile = tile_of_block(p);
    if (is_inactive(p, tile.sample)) return;
    Direction direction;
    if (p.grad.address) direction = direction_of(total(p, tile, 0, shared), signed_alpha(p, tile.sample));
    double sum = 0.0;
    for (long long k = tile.first + threadIdx.x; k < tile.last; k += kChunkThreads) {
        const Chunk c = chunk_at(p.samples, tile.sample, k);
        const Raw start = load(p.x_adv, c), centre = load(p.x, c);
        const Raw gradient = p.grad.address ? load(p.grad, c) : Raw{};
        Values z = decode(start, p.x_adv.dtype);
        const Values x = decode(centre, p.x.dtype);
        if (p.grad.address) move<Norm::kL1>(z, decode_gradient(gradient, p.grad.dtype), direction);
#pragma unroll
        for (int e = 0; e < kChunk; ++e) sum += fabsf(z.at[e] - x.at[e]);
    }
    leave(tile, 1, sum, shared);
}

// Blocks of the last launch that share a multiprocessor: with one more, its registers do not suffice.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kApplyBlocks = 4;
#else
constexpr int kApplyBlocks = 5;
#endif

// Last launch: the update itself.
template <Norm kNorm>
__global__ void __launch_bounds__(kChunkThreads, kApplyBlocks) pgd_step_apply(PgdStep p) {
    TileBlock& shared = shared_memory<TileBlock>();
    const Tile tile = tile_of_block(p);
    const bool inactive = is_inactive(p, tile.sample), moves = p.grad.address && !inactive;
    // 1) From the sums to the step and the part that stays.
    Direction direction;
    float weight = 1.0f;
    if (!inactive) {
        double sums[kSums] = {};
        totals(p, tile, sums, shared);
        if (moves) direction = direction_of(root<kNorm>(sums[0]), signed_alpha(p, tile.sample));
        if (p.ball) {
            const double distance = kNorm == Norm::kL2 ? moved_distance(sums, direction) : sums[1];
            weight = weight_of(distance, p.eps.of(tile.sample));
        }
    }
    for (long long k = tile.first + threadIdx.x; k < tile.last; k += kChunkThreads) {
        // 2) Read before use; x only where the sample is outside.
        const Chunk c = chunk_at(p.samples, tile.sample, k);
        const Raw start = load(p.x_adv, c);
        if (inactive) {
            store(p.out, c, start);
            continue;
        }
        const Raw centre = weight != 1.0f ? load(p.x, c) : Raw{};
        const Raw gradient = moves ? load(p.grad, c) : Raw{};
        // 3) Move, project, clip, round, write.
        Values z = decode(start, p.x_adv.dtype);
        if (moves) move<kNorm>(z, decode_gradient(gradient, p.grad.dtype), direction);
        scale_into_ball(z, decode(centre, p.x.dtype), weight);
        finish(p, c, z);
    }
}

}  // namespace sn_fast
