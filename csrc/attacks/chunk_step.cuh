// The parts of a step that work on one chunk: the move along the gradient, and the projection on a ball.
#pragma once

#include "attacks/pgd_step.h"
#include "attacks/samples.cuh"

namespace sn_fast {

// How far a sample moves along its gradient g: by length * (g * scale[0] * scale[1]). The scales are powers of two that
// bring the gradient's norm into [0.5, 1): a gradient of 1e-44 and one of 1e30 move alike.
struct Direction {
    float length = 0.0f;
    float scale[2] = {1.0f, 1.0f};
    float largest = 0.0f;  // 1-exact: only elements of this magnitude move

    __device__ double factor() const { return static_cast<double>(length) * scale[0] * scale[1]; }
};

__device__ inline float power_of_two(int exponent) {
    return bits_as_float(static_cast<unsigned>(exponent + 127) << 23);
}

__device__ inline Direction direction_of(double norm, float alpha) {
    Direction d;
    if (!(norm > 0.0)) return d;  // a zero gradient: no move
    int exponent;
    const double mantissa = frexp(norm, &exponent);
    const int half = -exponent / 2;
    d.scale[0] = power_of_two(half);
    d.scale[1] = power_of_two(-exponent - half);
    d.length = static_cast<float>(alpha / mantissa);
    return d;
}

// The norm of a sample is the root of the sum of its elements' powers (L2, L1).
template <Norm kNorm>
__device__ inline double power(float value) {
    return kNorm == Norm::kL2 ? static_cast<double>(value) * value : static_cast<double>(fabsf(value));
}

template <Norm kNorm>
__device__ inline double root(double sum) {
    return kNorm == Norm::kL2 ? sqrt(sum) : sum;
}

template <Norm kNorm>
__device__ inline void move(Values& start, const Values& g, const Direction& d) {
    if (d.length == 0.0f) return;
#pragma unroll
    for (int e = 0; e < kChunk; ++e) {
        if (kNorm == Norm::kL1Exact)
            start.at[e] += fabsf(g.at[e]) != d.largest ? 0.0f : g.at[e] > 0.0f ? d.length : -d.length;
        else
            start.at[e] += d.length * (g.at[e] * d.scale[0] * d.scale[1]);
    }
}

// The part of a radial projection that stays: 1 inside the ball, so that a sample there keeps its bits.
__device__ inline float weight_of(double distance, float eps) {
    return static_cast<float>(distance) > eps ? static_cast<float>(eps / distance) : 1.0f;
}

__device__ inline void scale_into_ball(Values& z, const Values& x, float weight) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) z.at[e] = weight == 1.0f ? z.at[e] : lerp(x.at[e], z.at[e], weight);
}

__device__ inline float shrunk(float z, float x, double threshold) {
    const double delta = z - x;
    return x + static_cast<float>(copysign(fmax(fabs(delta) - threshold, 0.0), delta));
}

__device__ inline void shrink_into_ball(Values& z, const Values& x, double threshold) {
#pragma unroll
    for (int e = 0; e < kChunk; ++e) z.at[e] = shrunk(z.at[e], x.at[e], threshold);
}

}  // namespace sn_fast
