// W / max(1, sigma / beta), or W / (sigma / beta), of many weights in one launch, and the gradient of one of them:
// (beta / sigma) (G - <G, W / sigma> dsigma/dW), in one reduction and one weight-gradient launch.
#pragma once

#include <cstdint>
#include <vector>

#include "core/launch.h"
#include "spectral/plan.h"

namespace sn_fast {

enum class Dtype : int;  // core/numeric.cuh

struct NormalizedWeight {
    const void* weight;  // dense; the result is laid out alike
    void* result;
    const float* sigma;
    std::int64_t count;
    float beta;
    bool cap;  // divide by max(1, sigma / beta); else by sigma / beta
    Dtype dtype;
};

void normalize(const std::vector<NormalizedWeight>& weights, const Stream& stream);

// The convolution's map from x to y (A, or A^T of a transposed one) gives dsigma/dW[r, c, t] = sum_o y[r, o]
// x[c, index(o, t)] for the rows of the group that attains sigma.
struct NormalizeBackward {
    const void* grad;  // laid out as the weight
    const void* weight;
    void* result;
    const float* sigma;
    const float* x;
    const float* y;
    const std::int64_t* top_group;  // null: one group
    const OperatorMap* map;         // on the device
    const std::int32_t* table;
    double* inner_partials;  // normalize_backward_blocks(count) of them
    float* partials;
    std::int32_t* counters;
    std::int64_t count;
    float beta;
    bool cap;
    Dtype grad_dtype, weight_dtype;
    int precision;
    // Sizes that the launch needs, equal to the map's.
    int groups, rows, columns, taps;  // of one group
    int parts;                        // into which the sum over positions is split
};

// Blocks that compute <G, W> of `count` elements.
__host__ __device__ inline int normalize_backward_blocks(std::int64_t count) {
    const std::int64_t wanted = (count + 4095) / 4096;
    return static_cast<int>(wanted < 1 ? 1 : wanted > 256 ? 256 : wanted);
}

void normalize_backward(const NormalizeBackward& backward, const Stream& stream);

}  // namespace sn_fast
