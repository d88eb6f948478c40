// A batch of samples in memory, as the host describes it to the kernels of the attacks' updates.
#pragma once

#include <cstdint>

#include "core/launch.h"

namespace sn_fast {

enum class Dtype : int;  // core/numeric.cuh

constexpr int kChunk = 8;           // one 16-byte access of a 16-bit type, two of float32
constexpr int kChunkThreads = 256;  // block size where a thread handles one chunk

// Division by a number known at launch, for numbers below 2^31: a multiplication (Granlund, Montgomery 1994).
struct Divisor {
    unsigned value = 1;
    unsigned magic = 1;
    int shift = 0;

    Divisor() = default;

    explicit Divisor(long long divisor) : value(static_cast<unsigned>(divisor)) {
        SN_CHECK(divisor > 0 && divisor >> 31 == 0, divisor);
        while ((1ll << shift) < divisor) ++shift;
        magic = static_cast<unsigned>((((1ll << shift) - divisor) << 32) / divisor + 1);
    }

    __device__ unsigned quotient(unsigned n) const {
        return (static_cast<unsigned>((static_cast<unsigned long long>(n) * magic) >> 32) + n) >> shift;
    }
};

// One tensor: samples of contiguous elements, batch_stride elements apart (0: one sample for all).
struct Elements {
    unsigned char* address = nullptr;  // null: there is none
    Dtype dtype{};
    long long batch_stride = 0;
    bool vector = false;  // see find_vectors
};

// What all tensors of an update share. Chunks are aligned in a dense batch: where the sample size is no multiple of 8,
// a sample starts inside a chunk, so that whole chunks can still be moved by 16-byte accesses.
struct Samples {
    long long count = 0;
    long long size = 0;
    long long chunks = 0;  // of one sample, the broken ones at its ends included
    Divisor by_chunks;     // where the whole batch has fewer than 2^31 chunks
    bool small = true;     // whether it has

    Samples() = default;

    Samples(long long batch, long long numel)
        : count(batch), size(numel), chunks(numel % kChunk == 0 ? numel / kChunk : (numel + 2 * kChunk - 2) / kChunk),
          small((batch * chunks) >> 31 == 0) {
        if (small) by_chunks = Divisor(chunks);
    }
};

// eps or alpha: one value, or one per sample.
struct Amount {
    float value = 0.0f;
    const float* per_sample = nullptr;

    __device__ float of(long long sample) const { return per_sample ? per_sample[sample] : value; }
};

// One side of the clip: a number, or float32 numbers in device memory that broadcast to the batch.
struct Bound {
    enum class Kind : int { kNone, kPerSample, kPerChannel, kDense, kNumber };

    Kind kind = Kind::kNone;
    Elements elements;     // kDense: as the samples lie; else where the numbers start
    Divisor inner, count;  // kPerChannel: element i of a sample has the number (i / inner) % count
    long long stride = 0;  // between numbers
    float number = 0.0f;   // kNumber: the same for all elements; no memory is read
};

}  // namespace sn_fast
