// Asynchronous copies (cp.async) of one thread, on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "emulator/memory_model.h"

namespace sn_fast {
namespace emulator {

// A copy may be done at any time between the call and the wait. Here it is done at the wait, so that a wait too few is
// seen; and at the call what was there becomes NaN, so that a copy to where others still read is seen.
class Copies {
public:
    void add(float* to, const float* from, bool wanted) {
        constexpr std::uint32_t kNan = 0xffffffff;
        std::memcpy(to, &kNan, sizeof kNan);
        const Unwatched unwatched;
        copies_.push_back({to, wanted ? from : nullptr, group_});
    }
    void end_group() {
        const Unwatched unwatched;
        ++group_;
    }
    void wait(int groups) {
        const float zero = 0.0f;
        for (Copy copy; take(copy, groups);) std::memcpy(copy.to, copy.from ? copy.from : &zero, sizeof zero);
    }
    void clear() { copies_.clear(), taken_ = 0, group_ = 0; }

private:
    struct Copy {
        float* to;
        const float* from;
        int group;
    };

    // The next copy to be done when no more than `groups` groups may be under way.
    bool take(Copy& copy, int groups) {
        const Unwatched unwatched;
        if (taken_ == copies_.size() || copies_[taken_].group >= group_ - groups) return false;
        copy = copies_[taken_++];
        if (taken_ == copies_.size()) copies_.clear(), taken_ = 0;
        return true;
    }

    std::vector<Copy> copies_;
    std::size_t taken_ = 0;  // of them
    int group_ = 0;
};

}  // namespace emulator
}  // namespace sn_fast
