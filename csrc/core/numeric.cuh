// Element types of tensors. All arithmetic is in float32: elements are widened on load and rounded once, on store.
#pragma once

#include <cmath>

#include "core/launch.h"

#ifndef SN_FAST_EMULATOR
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace sn_fast {

// Codes shared with Python (ops/compiled.py does not need them; ops/*.py pass them as ints).
enum class Dtype : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

inline int element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

#ifdef SN_FAST_EMULATOR
using half_t = _Float16;

struct bfloat16_t {
    std::uint16_t bits;
};
#else
using half_t = __half;
using bfloat16_t = __nv_bfloat16;
#endif

__device__ inline float to_float(float value) { return value; }

#ifdef SN_FAST_EMULATOR
inline float to_float(half_t value) { return static_cast<float>(value); }

inline float to_float(bfloat16_t value) { return bits_as_float(static_cast<std::uint32_t>(value.bits) << 16); }

inline bfloat16_t to_bfloat16(float value) {  // to nearest, ties to even
    const std::uint32_t bits = float_as_bits(value);
    if (std::isnan(value)) return {0x7fff};
    return {static_cast<std::uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
#else
__device__ inline float to_float(half_t value) { return __half2float(value); }

__device__ inline float to_float(bfloat16_t value) { return __bfloat162float(value); }

__device__ inline bfloat16_t to_bfloat16(float value) { return __float2bfloat16_rn(value); }

__device__ inline float bits_as_float(std::uint32_t bits) { return __uint_as_float(bits); }

__device__ inline std::uint32_t float_as_bits(float value) { return __float_as_uint(value); }
#endif

template <class T>
__device__ inline T from_float(float value);

template <>
__device__ inline float from_float<float>(float value) {
    return value;
}

template <>
__device__ inline half_t from_float<half_t>(float value) {
#ifdef SN_FAST_EMULATOR
    return static_cast<half_t>(value);
#else
    return __float2half_rn(value);
#endif
}

template <>
__device__ inline bfloat16_t from_float<bfloat16_t>(float value) {
    return to_bfloat16(value);
}

__device__ inline bool is_finite(float value) { return (float_as_bits(value) & 0x7f800000u) != 0x7f800000u; }

// 16 bytes of elements, moved in one access where the address allows.
template <class T>
struct alignas(16) Pack {
    static constexpr int kCount = 16 / sizeof(T);
    T values[kCount];
};

// Whether a pack can be moved to or from here.
template <class T>
__device__ inline bool is_aligned(const T* address) {
    return reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
}

// A pointer as a value of its own: the compiler would add its parts again for every access through it.
template <class T>
__device__ inline T* opaque(T* pointer) {
#ifndef SN_FAST_EMULATOR
    asm("" : "+l"(pointer));
#endif
    return pointer;
}

// This thread's number. The compiler takes it as new at every call: what follows from it is then not kept in registers
// through code that does not use it.
__device__ inline int opaque_thread_index() {
    int number = static_cast<int>(threadIdx.x);
#ifndef SN_FAST_EMULATOR
    asm volatile("" : "+r"(number));
#endif
    return number;
}

// Calls body with a value of the C++ type of `dtype`.
template <class Body>
void dispatch(Dtype dtype, Body body) {
    switch (dtype) {
        case Dtype::kFloat32: return body(float{});
        case Dtype::kFloat16: return body(half_t{});
        case Dtype::kBfloat16: return body(bfloat16_t{});
    }
    SN_CHECK(false, "dtype code ", static_cast<int>(dtype), " is unknown");
}

}  // namespace sn_fast
