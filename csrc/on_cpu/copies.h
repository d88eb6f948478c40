// Asynchronous copies (cp.async) on the CPU.
#pragma once

#include <cstddef>
#include <cstring>
#include <vector>

namespace sn_fast {
namespace on_cpu {

// Asynchronous copies of one thread: done when they are waited for and not before, so that a wait too few is seen.
class Copies {
public:
    void add(float* to, const float* from, bool wanted) { copies_.push_back({to, wanted ? from : nullptr, group_}); }
    void end_group() { ++group_; }
    void wait(int groups) {
        const float zero = 0.0f;
        std::size_t done = 0;
        for (; done < copies_.size() && copies_[done].group < group_ - groups; ++done)
            std::memcpy(copies_[done].to, copies_[done].from ? copies_[done].from : &zero, sizeof zero);
        copies_.erase(copies_.begin(), copies_.begin() + static_cast<std::ptrdiff_t>(done));
    }
    void clear() { copies_.clear(), group_ = 0; }

private:
    struct Copy {
        float* to;
        const float* from;
        int group;
    };
    std::vector<Copy> copies_;
    int group_ = 0;
};

}  // namespace on_cpu
}  // namespace sn_fast
