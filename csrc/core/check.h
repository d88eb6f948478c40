// Host-side checks. The message of SN_CHECK is the condition itself, then what was wrong with which value.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace sn_fast {

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

}  // namespace sn_fast

// Throws std::invalid_argument, which Python sees as ValueError: "kernels: <condition> fails: <details>".
#define SN_CHECK(condition, ...)                                                                                    \
    do {                                                                                                            \
        if (!(condition))                                                                                           \
            throw std::invalid_argument(::sn_fast::text("sn_fast kernels: ", #condition, " fails: ", __VA_ARGS__)); \
    } while (false)
