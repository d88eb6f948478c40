// Philox4x32-10: a random function of counter and key. No state, so any thread can draw any number of the sequence.
// Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include "core/launch.h"

namespace sn_fast {

struct PhiloxCounter {
    std::uint32_t words[4];
};

struct PhiloxKey {
    std::uint32_t words[2];
};

__device__ inline PhiloxCounter philox(PhiloxCounter c, PhiloxKey key) {
    constexpr int kRounds = 10;
#pragma unroll
    for (int round = 0; round < kRounds; ++round) {
        // 1) Two 32 x 32 -> 64 bit products.
        const std::uint64_t first = static_cast<std::uint64_t>(c.words[0]) * 0xD2511F53u;
        const std::uint64_t second = static_cast<std::uint64_t>(c.words[2]) * 0xCD9E8D57u;
        // 2) Their halves change places; the high ones mix with the other words and the key.
        c = {{static_cast<std::uint32_t>(second >> 32) ^ c.words[1] ^ key.words[0], static_cast<std::uint32_t>(second),
              static_cast<std::uint32_t>(first >> 32) ^ c.words[3] ^ key.words[1], static_cast<std::uint32_t>(first)}};
        // 3) The next round's key: a Weyl sequence.
        key.words[0] += 0x9E3779B9u;
        key.words[1] += 0xBB67AE85u;
    }
    return c;
}

}  // namespace sn_fast
