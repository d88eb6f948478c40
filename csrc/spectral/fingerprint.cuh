// The kernel that hashes all weights, compares with their records and renews these.
#pragma once

#include "core/reduce.cuh"
#include "spectral/fingerprint.h"

namespace sn_fast {

constexpr int kFingerprintThreads = 256;

struct FingerprintShared {
    unsigned long long sums[kFingerprintThreads / kWarp];
    double products[kFingerprintThreads / kWarp];
    bool last;
};

// splitmix64 (Steele, Lea, Flood 2014) of a word and its logical index.
__device__ inline unsigned long long mixed(long long word, long long index) {
    unsigned long long z =
        static_cast<unsigned long long>(word) + static_cast<unsigned long long>(index + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ inline long long logical_index(const Words& w, int place) {
    if (w.digits == 0) return place;
    long long index = 0;
    for (int d = 0; d < w.digits; ++d) {
        const int next = place / w.size[d];
        index += static_cast<long long>(place - next * w.size[d]) * w.stride[d];
        place = next;
    }
    return index;
}

// An element's bits, as the signed integer that the reference takes them for.
__device__ inline std::int32_t word_of(float value) { return static_cast<std::int32_t>(float_as_bits(value)); }

template <class T>
__device__ std::int16_t word_of(T value) {
    union {
        T value;
        std::int16_t word;
    } bits;
    bits.value = value;
    return bits.word;
}

template <class T>
__device__ T element_of(long long word);

template <>
__device__ inline float element_of<float>(long long word) {
    return bits_as_float(static_cast<std::uint32_t>(word));
}

template <class T>
__device__ T element_of(long long word) {
    union {
        T value;
        std::int16_t word;
    } bits;
    bits.word = static_cast<std::int16_t>(word);
    return bits.value;
}

// This thread's part of the hash of one unit.
template <class T>
__device__ unsigned long long sum_words(const Words& w, const T* weight, const WordsUnit& unit) {
    constexpr int kCount = Pack<T>::kCount;
    unsigned long long sum = 0;
    const T* part = weight + unit.first;
    const bool aligned = is_aligned(part);
    for (int i = opaque_thread_index() * kCount; i < unit.count; i += kFingerprintThreads * kCount) {
        if (aligned && i + kCount <= unit.count) {
            const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(part + i);
#pragma unroll
            for (int e = 0; e < kCount; ++e)
                sum += mixed(word_of(pack.values[e]), logical_index(w, unit.first + i + e));
        } else {
            for (int e = 0; e < kCount && i + e < unit.count; ++e)
                sum += mixed(word_of(part[i + e]), logical_index(w, unit.first + i + e));
        }
    }
    return sum;
}

// Renews the sampled words of a record, and returns how the weight relates to the one before.
template <class T>
__device__ Change renew_samples(const Words& w, const T* weight, const FingerprintParams& p, std::int64_t* samples,
                                FingerprintShared& s) {
    double now_now = 0.0, now_before = 0.0, before_before = 0.0;
    for (int i = opaque_thread_index(); i < w.samples; i += kFingerprintThreads) {
        const T element = weight[p.table[w.sample + i]];
        const double now = static_cast<double>(to_float(element));
        const double before = static_cast<double>(to_float(element_of<T>(samples[i])));
        now_now += now * now, now_before += now * before, before_before += before * before;
        samples[i] = word_of(element);
    }
    now_now = block_reduce(now_now, Add{}, s.products);
    now_before = block_reduce(now_before, Add{}, s.products);
    before_before = block_reduce(before_before, Add{}, s.products);
    // Vectors of a weight that is not finite would be no better.
    if (!(now_now <= 1.7e308)) return Change::kMoved;
    const double away = before_before == 0.0 ? now_now : now_now - now_before * now_before / before_before;
    return away <= static_cast<double>(p.replaced) * now_now ? Change::kMoved : Change::kReplaced;
}

template <class T>
__device__ void fingerprint_unit(const WordsUnit& unit, const FingerprintParams& p, FingerprintShared& s) {
    const Words& w = p.words[unit.op];
    const T* weight = static_cast<const T*>(p.weights[unit.op]);
    // 1) This block's part of the hash. A sum of integers is the same in every order.
    const unsigned long long sum = block_reduce(sum_words(w, weight, unit), Add{}, s.sums);
    // 2) The block that comes last goes on.
    if (opaque_thread_index() == 0) {
        atomicAdd(&p.sums[unit.op], sum);
        __threadfence();
        s.last = atomicAdd(&p.arrived[unit.op], 1) == w.units - 1;
        __threadfence();
    }
    __syncthreads();
    if (!s.last) return;
    // 3) The comparison.
    const auto hash = static_cast<std::int64_t>(__ldcg(&p.sums[unit.op]));
    std::int64_t* record = p.records[unit.op];
    const bool same = record[0] == hash;
    if (same && !p.force) return;
    // 4) The record becomes that of the weight at hand.
    const Change change = renew_samples(w, weight, p, record + 1, s);
    if (opaque_thread_index() != 0) return;
    record[0] = hash;
    p.changes[unit.op] = static_cast<std::int32_t>(change);
    if (p.alarms && change == Change::kReplaced) p.alarms[unit.op] = 1;
    atomicAdd(&p.changes[p.n_operators], 1);
}

__global__ void __launch_bounds__(kFingerprintThreads) fingerprint_weights(FingerprintParams p) {
    FingerprintShared& s = shared_memory<FingerprintShared>();
    const WordsUnit unit = p.units[blockIdx.x];
    switch (static_cast<Dtype>(p.words[unit.op].dtype)) {
        case Dtype::kFloat32: return fingerprint_unit<float>(unit, p, s);
        case Dtype::kFloat16: return fingerprint_unit<half_t>(unit, p, s);
        case Dtype::kBfloat16: return fingerprint_unit<bfloat16_t>(unit, p, s);
    }
}

}  // namespace sn_fast
