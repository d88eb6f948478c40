// A batch of samples in memory, in chunks of 8 elements: the unit of loading, computing and storing of every update.
//
// Elements stay as they lie in memory (Raw) until they are used, and become float32 then (decode); encode rounds once.
// Dtypes are run-time values: a branch that all threads take alike costs nothing beside the memory traffic, and each
// kernel is compiled once instead of nine times.
#pragma once

#include <cstring>
#include <initializer_list>

#include "attacks/samples.h"
#include "core/numeric.cuh"

namespace sn_fast {

// Finds out whether whole chunks of a tensor start at multiples of 16 bytes, in every sample.
inline void find_vectors(const Samples& samples, std::initializer_list<Elements*> tensors) {
    for (Elements* t : tensors)
        t->vector = reinterpret_cast<std::uintptr_t>(t->address) % 16 == 0 &&
                    (t->batch_stride - samples.size) * element_size(t->dtype) % 16 == 0;
}

// Blocks of kChunkThreads threads, one thread per chunk of the batch.
inline unsigned chunk_blocks(const Samples& samples) {
    const long long blocks = (samples.count * samples.chunks + kChunkThreads - 1) / kChunkThreads;
    SN_CHECK(blocks < (1ll << 31), "the batch of ", samples.count, " samples of ", samples.size,
             " elements is too large for one launch; split it");
    return static_cast<unsigned>(blocks);
}

// Elements [first, first + 8) of a sample, of which those inside [0, size) exist.
struct Chunk {
    long long sample;
    long long first;
    int begin, end;  // which of the 8 exist

    __device__ bool whole() const { return begin == 0 && end == kChunk; }
};

__device__ inline Chunk chunk_at(const Samples& samples, long long sample, long long index) {
    const int offset = samples.size % kChunk == 0 ? 0 : static_cast<int>((sample * samples.size) % kChunk);
    const long long first = index * kChunk - offset;
    const long long left = samples.size - first;
    return {sample, first, first < 0 ? static_cast<int>(-first) : 0,
            left >= kChunk ? kChunk
            : left > 0     ? static_cast<int>(left)
                           : 0};
}

// The chunk of this thread where every thread has one; sample == count: none left.
__device__ inline Chunk chunk_of_thread(const Samples& samples) {
    const long long item = static_cast<long long>(blockIdx.x) * kChunkThreads + threadIdx.x;
    const long long sample =
        samples.small ? samples.by_chunks.quotient(static_cast<unsigned>(item)) : item / samples.chunks;
    if (sample >= samples.count) return {samples.count, 0, 0, 0};
    return chunk_at(samples, sample, item - sample * samples.chunks);
}

// A chunk as it lies in memory: 8 words of float32, or 4 of a 16-bit type.
struct alignas(16) Raw {
    unsigned words[kChunk];
};

__device__ inline bool is_wide(Dtype dtype) { return dtype == Dtype::kFloat32; }

__device__ inline void set_words(Raw& raw, int first, uint4 four) {
    raw.words[first] = four.x;
    raw.words[first + 1] = four.y;
    raw.words[first + 2] = four.z;
    raw.words[first + 3] = four.w;
}

__device__ inline uint4 get_words(const Raw& raw, int first) {
    return {raw.words[first], raw.words[first + 1], raw.words[first + 2], raw.words[first + 3]};
}

__device__ inline unsigned char* address_of(const Elements& t, const Chunk& c) {
    return t.address + (c.sample * t.batch_stride + c.first) * (is_wide(t.dtype) ? 4 : 2);
}

// Elements that do not exist come as 0, which is also 0.0.
__device__ inline Raw load(const Elements& t, const Chunk& c) {
    Raw raw = {};
    const unsigned char* from = address_of(t, c);
    if (c.whole() && t.vector) {
        set_words(raw, 0, reinterpret_cast<const uint4*>(from)[0]);
        if (is_wide(t.dtype)) set_words(raw, 4, reinterpret_cast<const uint4*>(from)[1]);
        return raw;
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
        if (e < c.begin || e >= c.end) continue;
        if (is_wide(t.dtype))
            raw.words[e] = reinterpret_cast<const unsigned*>(from)[e];
        else
            raw.words[e / 2] |= static_cast<unsigned>(reinterpret_cast<const unsigned short*>(from)[e]) << e % 2 * 16;
    }
    return raw;
}

__device__ inline void store(const Elements& t, const Chunk& c, const Raw& raw) {
    unsigned char* to = address_of(t, c);
    if (c.whole() && t.vector) {
        reinterpret_cast<uint4*>(to)[0] = get_words(raw, 0);
        if (is_wide(t.dtype)) reinterpret_cast<uint4*>(to)[1] = get_words(raw, 4);
        return;
    }
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
        if (e < c.begin || e >= c.end) continue;
        if (is_wide(t.dtype))
            reinterpret_cast<unsigned*>(to)[e] = raw.words[e];
        else
            reinterpret_cast<unsigned short*>(to)[e] = static_cast<unsigned short>(raw.words[e / 2] >> e % 2 * 16);
    }
}

// 8 numbers in float32.
struct alignas(16) Values {
    float at[kChunk];
};

__device__ inline float half_as_float(unsigned bits) {
    const unsigned short low = static_cast<unsigned short>(bits);
    half_t value;
    std::memcpy(&value, &low, sizeof value);
    return to_float(value);
}

template <class T>
__device__ inline unsigned bits_of(T value) {
    unsigned short bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

__device__ inline Values decode(const Raw& raw, Dtype dtype) {
    Values v;
    if (dtype == Dtype::kFloat32) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) v.at[e] = bits_as_float(raw.words[e]);
    } else if (dtype == Dtype::kBfloat16) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e)
            v.at[e] = bits_as_float(e % 2 == 0 ? raw.words[e / 2] << 16 : raw.words[e / 2] & 0xffff0000u);
    } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) v.at[e] = half_as_float(raw.words[e / 2] >> e % 2 * 16);
    }
    return v;
}

__device__ inline Raw encode(const Values& v, Dtype dtype) {
    Raw raw = {};
    if (dtype == Dtype::kFloat32) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) raw.words[e] = float_as_bits(v.at[e]);
    } else if (dtype == Dtype::kBfloat16) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) raw.words[e / 2] |= bits_of(to_bfloat16(v.at[e])) << e % 2 * 16;
    } else {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) raw.words[e / 2] |= bits_of(from_float<half_t>(v.at[e])) << e % 2 * 16;
    }
    return raw;
}

// A gradient's elements; those that are not finite count as 0.
__device__ inline Values decode_gradient(const Raw& raw, Dtype dtype) {
    Values v = decode(raw, dtype);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v.at[e] = is_finite(v.at[e]) ? v.at[e] : 0.0f;
    return v;
}

__device__ inline Values load_bound(const Bound& bound, const Chunk& c, float none) {
    if (bound.kind == Bound::Kind::kDense) return decode(load(bound.elements, c), Dtype::kFloat32);
    Values v;
    const Elements& t = bound.elements;
    const float* numbers = reinterpret_cast<const float*>(t.address) + c.sample * t.batch_stride;
    if (bound.kind == Bound::Kind::kPerChannel) {
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
            v.at[e] = none;
            if (e < c.begin || e >= c.end) continue;
            const unsigned run = bound.inner.quotient(static_cast<unsigned>(c.first + e));
            v.at[e] = numbers[(run - bound.count.quotient(run) * bound.count.value) * bound.stride];
        }
        return v;
    }
    float number = none;
    if (bound.kind == Bound::Kind::kNumber) number = bound.number;
    if (bound.kind == Bound::Kind::kPerSample) number = numbers[0];
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v.at[e] = number;
    return v;
}

// As torch.clamp: NaN spreads, and the upper limit wins.
__device__ inline float clamp(float value, float low, float high) {
    value = value < low || low != low ? low : value;
    return value > high || high != high ? high : value;
}

__device__ inline void clip(Values& v, const Bound& lower, const Bound& upper, const Chunk& c) {
    if (lower.kind == Bound::Kind::kNone && upper.kind == Bound::Kind::kNone) return;
    if (lower.kind == Bound::Kind::kNumber && upper.kind == Bound::Kind::kNumber) {  // neither is NaN
#pragma unroll
        for (int e = 0; e < kChunk; ++e) {
            const float above = v.at[e] < lower.number ? lower.number : v.at[e];
            v.at[e] = above > upper.number ? upper.number : above;
        }
        return;
    }
    const Values low = load_bound(lower, c, -INFINITY), high = load_bound(upper, c, INFINITY);
#pragma unroll
    for (int e = 0; e < kChunk; ++e) v.at[e] = clamp(v.at[e], low.at[e], high.at[e]);
}

// As torch.lerp: exactly `from` for weight 0 and `to` for weight 1.
__device__ inline float lerp(float from, float to, float weight) {
    return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
}

}  // namespace sn_fast
