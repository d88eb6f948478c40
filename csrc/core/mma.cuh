// Matrix instructions of one warp, D += A B with A 16 x K and B K x 8, and the roundings of their operands.
//
// Lane l holds, with g = l / 4 and t = l % 4:
//   tf32 (K = 8):   a = A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4];   b = B[t][g], B[t+4][g]
//   bf16 (K = 16):  a = A[g][2t..], A[g+8][2t..], A[g][2t+8..], A[g+8][2t+8..];   b = B[2t..][g], B[2t+8..][g]
//                   (pairs of neighbouring k in one register, the lower k in the lower half)
//   both:           d = D[g][2t], D[g][2t+1], D[g+8][2t], D[g+8][2t+1]
#pragma once

#include "core/numeric.cuh"

namespace sn_fast {

// float32 rounded to the 10 mantissa bits of tf32, to nearest, ties away from zero, as an operand: what is below those
// bits is undefined, and not looked at by mma_tf32.
__device__ inline std::uint32_t tf32_operand(float value) {
#ifdef SN_FAST_EMULATOR
    const std::uint32_t bits = float_as_bits(value);
    return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#else
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
#endif
}

// The same as a number.
__device__ inline std::uint32_t to_tf32(float value) { return tf32_operand(value) & 0xffffe000u; }

__device__ inline std::uint32_t pack_bfloat16(float low, float high) {
#ifdef SN_FAST_EMULATOR
    return to_bfloat16(low).bits | static_cast<std::uint32_t>(to_bfloat16(high).bits) << 16;
#else
    std::uint32_t bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
#endif
}

#ifdef SN_FAST_EMULATOR

struct Fragments {
    std::uint32_t a[4], b[2];
};

inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    const auto* lanes = emulator::machine().exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    const int lane = emulator::machine().lane(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        float left[8], right[8];
        for (int k = 0; k < 8; ++k) {
            const auto rows = sn_fast_lane_value<Fragments>(lanes, row % 8 * 4 + k % 4);
            const auto columns = sn_fast_lane_value<Fragments>(lanes, column * 4 + k % 4);
            left[k] = bits_as_float(rows.a[row / 8 + 2 * (k / 4)] & 0xffffe000u);
            right[k] = bits_as_float(columns.b[k / 4] & 0xffffe000u);
        }
        const int block = emulator::tensor_core().tf32_block;
        for (int k = 0; k < 8; k += block) d[i] = emulator::tensor_core_sum(d[i], left + k, right + k, block);
    }
}

inline float half_of(std::uint32_t pair, int high) { return bits_as_float(high ? pair & 0xffff0000u : pair << 16); }

inline void mma_bfloat16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    const auto* lanes = emulator::machine().exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
    const int lane = emulator::machine().lane(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        float left[16], right[16];
        for (int k = 0; k < 16; ++k) {
            const auto rows = sn_fast_lane_value<Fragments>(lanes, row % 8 * 4 + k % 8 / 2);
            const auto columns = sn_fast_lane_value<Fragments>(lanes, column * 4 + k % 8 / 2);
            left[k] = half_of(rows.a[row / 8 + 2 * (k / 8)], k % 2);
            right[k] = half_of(columns.b[k / 8], k % 2);
        }
        const int block = emulator::tensor_core().bfloat16_block;
        for (int k = 0; k < 16; k += block) d[i] = emulator::tensor_core_sum(d[i], left + k, right + k, block);
    }
}

#else

__device__ inline void mma_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_bfloat16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace sn_fast
