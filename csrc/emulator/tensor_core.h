// How tensor cores add.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace sn_fast {
namespace emulator {

// Of a matrix instruction's products, `block` are added to the sum at a time. They and the sum are aligned to the
// largest exponent among them, what lies `extra_bits` below float32's last bit is cut off each, and the exact sum
// of the rest is cut to float32. All cuts are towards zero. Measured by Fasi, Higham, Mikaitis, Pranesh 2021,
// "Numerical behavior of NVIDIA tensor cores" (A100), and in the same way since (H100).
struct TensorCore {
    int tf32_block, bfloat16_block, extra_bits;
};

constexpr TensorCore kA100{4, 8, 1}, kH100{8, 16, 2};

inline TensorCore& tensor_core() {
    static TensorCore chosen = kH100;
    return chosen;
}

inline float tensor_core_sum(float sum, const float* a, const float* b, int block) {
    constexpr int kLeast = -126;  // exponent of float32's smallest normal number
    // 1) The largest exponent. That of a product is the sum of its factors', whether or not their product carries.
    double plain = sum;
    int exponent = sum == 0.0f ? kLeast : std::max(kLeast, std::ilogb(sum));
    for (int i = 0; i < block; ++i) {
        const double product = static_cast<double>(a[i]) * static_cast<double>(b[i]);
        plain += product;
        if (product != 0.0 && std::isfinite(product))
            exponent = std::max(exponent, std::ilogb(a[i]) + std::ilogb(b[i]));
    }
    if (!std::isfinite(plain)) return static_cast<float>(plain);
    // 2) All terms in units of the last bit that is kept: a conversion to an integer cuts.
    const int last = exponent - 23 - tensor_core().extra_bits;
    const double scale = std::ldexp(1.0, -last);
    auto total = static_cast<std::int64_t>(static_cast<double>(sum) * scale);
    for (int i = 0; i < block; ++i)
        total += static_cast<std::int64_t>(static_cast<double>(a[i]) * static_cast<double>(b[i]) * scale);
    // 3) To float32, towards zero.
    const double exact = std::ldexp(static_cast<double>(total), last);
    const auto rounded = static_cast<float>(exact);
    const bool away = std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(exact);
    return away ? std::nextafter(rounded, 0.0f) : rounded;
}

}  // namespace emulator
}  // namespace sn_fast
