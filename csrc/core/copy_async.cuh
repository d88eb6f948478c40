// Copies from global to shared memory that run on while the thread goes on (cp.async), in groups that finish in order.
#pragma once

#include "core/launch.h"

namespace sn_fast {

// One float; zero where it is not `wanted`, and `from` is then not read.
__device__ inline void copy_async(float* to, const float* from, bool wanted) {
#ifdef SN_FAST_EMULATOR
    emulator::machine().fibre().copies.add(to, from, wanted);
#else
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(wanted ? 4 : 0) : "memory");
#endif
}

// 16 bytes; both addresses are multiples of 16.
__device__ inline void copy_async(uint4* to, const uint4* from) {
#ifdef SN_FAST_EMULATOR
    for (int i = 0; i < 4; ++i)
        emulator::machine().fibre().copies.add(reinterpret_cast<float*>(to) + i,
                                               reinterpret_cast<const float*>(from) + i, true);
#else
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    // Through L1: the other half of a 32-byte sector is mostly asked for by the next instruction.
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(at), "l"(from) : "memory");
#endif
}

// Ends a group: this thread's copies since the last one.
__device__ inline void end_copy_group() {
#ifdef SN_FAST_EMULATOR
    emulator::machine().fibre().copies.end_group();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until no more than kGroups of this thread's groups are under way. A barrier makes them visible to others.
template <int kGroups>
__device__ inline void wait_for_copies() {
#ifdef SN_FAST_EMULATOR
    emulator::machine().fibre().copies.wait(kGroups);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// Waits until all of this thread's copies have arrived.
__device__ inline void wait_for_all_copies() {
#ifdef SN_FAST_EMULATOR
    end_copy_group();
    wait_for_copies<0>();
#else
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace sn_fast
