// Copies from global to shared memory that pass no register: a thread has as many under way as it starts.
#pragma once

#include "core/numeric.cuh"

#ifdef SN_FAST_ON_CPU
#include <utility>
#include <vector>
#endif

namespace sn_fast {

#ifdef SN_FAST_ON_CPU

// Nothing has arrived before it is waited for.
inline std::vector<std::pair<uint4*, const uint4*>>& copies_under_way() {
    static std::vector<std::pair<uint4*, const uint4*>> copies;
    return copies;
}

inline void copy_async(uint4* shared, const uint4* global) { copies_under_way().emplace_back(shared, global); }

inline void wait_for_copies() {
    for (const auto& [shared, global] : copies_under_way()) *shared = *global;
    copies_under_way().clear();
}

#else

// 16 bytes; both addresses are multiples of 16.
__device__ inline void copy_async(uint4* shared, const uint4* global) {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    // Through L1: the other half of a 32-byte sector is mostly asked for by the next instruction.
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}

// This thread's copies have arrived; those of others only after a barrier.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

#endif

}  // namespace sn_fast
