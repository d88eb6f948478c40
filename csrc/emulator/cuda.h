// Runs CUDA kernels on the CPU, for tests: one fibre per CUDA thread, blocks one after the other or on OS threads.
//
// Between two synchronisations a fibre runs alone in its block, and the order in which fibres (and blocks) run is
// shuffled by a seed, so a kernel that needs a barrier it does not have computes different results under different
// seeds. Shared memory is a heap block of exactly the size asked for, filled with NaN before each block, so
// AddressSanitizer sees every access beyond it. With several blocks at a time, ThreadSanitizer sees what is not ordered
// between them (memory_model.h). Time is not modelled, and it is no CPU path for users.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "emulator/machine.h"
#include "emulator/tensor_core.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using cudaStream_t = void*;

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace sn_fast {

inline float bits_as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline std::uint32_t float_as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// -- what launch.h offers on a GPU -----------------------------------------------------------------------------------

struct Stream;

inline int multiprocessors(int) { return 3; }

inline void let_next_start() {}
inline void wait_for_previous() {}

inline void fill_zero(void* memory, std::size_t bytes, const Stream&) { std::memset(memory, 0, bytes); }

template <class T>
T& shared_memory() {
    if (sizeof(T) > emulator::machine().shared_bytes) throw std::logic_error("emulator: shared memory too small");
    return *reinterpret_cast<T*>(emulator::machine().shared.get());
}

template <class Params>
void launch(void (*kernel)(Params), const char*, unsigned blocks, int threads, std::size_t shared, const Stream&,
            const Params& params, bool = false) {
    emulator::Queue queue(blocks);
    const std::size_t machines = std::min(static_cast<std::size_t>(emulator::parallel()), queue.blocks.size());
    std::vector<std::exception_ptr> failures(machines);
    const auto work = [&](std::size_t machine) {
        const emulator::Unwatched unwatched;  // as is all that is not done by the fibres
        try {
            emulator::Machine(blocks, threads, shared).run(queue, [&] { kernel(params); });
        } catch (...) {
            failures[machine] = std::current_exception();
        }
    };
    if (machines == 1 && !emulator::kWatched) {
        work(0);
    } else {
        std::vector<std::thread> os_threads;
        for (std::size_t i = 0; i < machines; ++i) os_threads.emplace_back(work, i);
        for (std::thread& t : os_threads) t.join();
    }
    for (const std::exception_ptr& failure : failures)
        if (failure) std::rethrow_exception(failure);
}

}  // namespace sn_fast

// -- CUDA's names ----------------------------------------------------------------------------------------------------

#define threadIdx (::sn_fast::emulator::machine().fibre().thread)
#define blockIdx (::sn_fast::emulator::machine().blockIdx)
#define blockDim (::sn_fast::emulator::machine().blockDim)
#define gridDim (::sn_fast::emulator::machine().gridDim)

inline void __syncthreads() { sn_fast::emulator::machine().block_barrier(); }
inline void __syncwarp(unsigned = 0xffffffffu) { sn_fast::emulator::machine().warp_barrier(); }
inline void __threadfence() { sn_fast::emulator::machine().fence(); }

template <class T>
T sn_fast_lane_value(const std::uint64_t (*slots)[8], int lane) {
    T value;
    std::memcpy(&value, slots[lane], sizeof value);
    return value;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    const int lane = sn_fast::emulator::machine().lane();
    return sn_fast_lane_value<T>(sn_fast::emulator::machine().exchange(value), lane ^ mask);
}

template <class T>
T atomicAdd(T* address, T value) {
    return sn_fast::emulator::machine().atomic_add(address, value);
}

template <class T>
T __ldcg(const T* address) {
    return *address;
}

template <class T>
T __ldg(const T* address) {
    return *address;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<std::uint64_t>(a) * b >> 32);
}

inline void sincospif(float x, float* sine, float* cosine) {
    const double angle = 3.14159265358979323846 * static_cast<double>(x);
    *sine = static_cast<float>(std::sin(angle)), *cosine = static_cast<float>(std::cos(angle));
}

template <class T>
T min(T a, T b) {
    return std::min(a, b);
}
template <class T>
T max(T a, T b) {
    return std::max(a, b);
}
