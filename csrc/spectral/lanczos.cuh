// The kernels of the Lanczos start: one block per group of an operator.
#pragma once

#include "spectral/lanczos.h"
#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kLanczosThreads = 512;
constexpr int kMaxLanczos = 32;

struct OrthogonalizeParams {
    const Span* spans;
    float* basis;
    double* norms;  // [span][n_iterations]
    std::int64_t size;
    bool is_image;
    int index;  // of the new vector in the basis
    int n_iterations;
};

struct OrthogonalizeShared {
    double coefficients[kMaxLanczos];
    double scratch[kLanczosThreads / kWarp];
};

// Makes vector `index` of a basis orthogonal to those before it and a unit vector, and stores its length. Where only
// rounding is left, the span is exhausted: the vector and its length become zero.
__global__ void __launch_bounds__(kLanczosThreads) orthogonalize_kernel(OrthogonalizeParams p) {
    OrthogonalizeShared& s = shared_memory<OrthogonalizeShared>();
    const Span span = p.spans[blockIdx.x];
    const int first = p.is_image ? span.image_first : span.start_first;
    const int length = p.is_image ? span.image_length : span.start_length;
    const int thread = static_cast<int>(threadIdx.x);
    float* x = p.basis + p.index * p.size + first;
    auto square_sum = [&] {
        double sum = 0.0;
        for (int i = thread; i < length; i += kLanczosThreads) sum += squared(x[i]);
        return block_reduce(sum, Add{}, s.scratch);
    };
    // 1) The length before.
    const double before = square_sum();
    // 2) Gram and Schmidt, twice, which is enough.
    for (int pass = 0; pass < 2; ++pass) {
        for (int j = 0; j < p.index; ++j) {
            const float* b = p.basis + j * p.size + first;
            double sum = 0.0;
            for (int i = thread; i < length; i += kLanczosThreads) sum += static_cast<double>(b[i]) * x[i];
            sum = block_reduce(sum, Add{}, s.scratch);
            if (thread == 0) s.coefficients[j] = sum;
        }
        __syncthreads();
        for (int i = thread; i < length; i += kLanczosThreads) {
            double value = x[i];
            for (int j = 0; j < p.index; ++j) value -= s.coefficients[j] * p.basis[j * p.size + first + i];
            x[i] = static_cast<float>(value);
        }
        __syncthreads();
    }
    // 3) A unit vector.
    const double after = square_sum();
    const Scale scale = inverse_norm(after);
    const bool alive = scale.alive && after > 4e-12 * before;
    for (int i = thread; i < length; i += kLanczosThreads) x[i] = alive ? x[i] * scale.first * scale.second : 0.0f;
    if (thread == 0 && p.norms != nullptr) p.norms[blockIdx.x * p.n_iterations + p.index] = alive ? sqrt(after) : 0.0;
}

struct CombineParams {
    const Span* spans;
    const float* bases[2];
    float* results[2];
    const double* diagonal;
    const double* off_diagonal;
    std::int64_t sizes[2];
    int n_iterations;
};

struct CombineShared {
    double matrix[2][kMaxLanczos][kMaxLanczos];
    double right[kMaxLanczos], left[kMaxLanczos];
    double scratch[kLanczosThreads / kWarp];
};

constexpr int kSquarings = 30;

// The leading singular vectors of the bidiagonal matrix B of one span, and with them those of the operator.
__global__ void __launch_bounds__(kLanczosThreads) combine_kernel(CombineParams p) {
    CombineShared& s = shared_memory<CombineShared>();
    const Span span = p.spans[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x), n = p.n_iterations;
    const double* d = p.diagonal + blockIdx.x * n;
    const double* e = p.off_diagonal + blockIdx.x * n;  // e[j] couples vector j with j - 1
    // 1) B^T B, scaled to a largest element of about 1. It is tridiagonal.
    double scale = 0.0;
    for (int j = 0; j < n; ++j) scale = fmax(scale, fmax(d[j], j > 0 ? e[j] : 0.0));
    const bool alive = scale > 0.0 && scale < 1e300;
    for (int i = thread; i < n * n; i += kLanczosThreads) {
        const int row = i / n, column = i % n, low = min(row, column);
        double value = 0.0;
        if (alive && row == column) {
            const double a = d[row] / scale, b = row > 0 ? e[row] / scale : 0.0;
            value = a * a + b * b;
        } else if (alive && (row - column == 1 || column - row == 1)) {
            value = d[low] / scale * (e[low + 1] / scale);
        }
        s.matrix[0][row][column] = value;
    }
    __syncthreads();
    // 2) Squared again and again it becomes the projector on the leading eigenvector.
    int now = 0;
    for (int squaring = 0; alive && squaring < kSquarings; ++squaring, now ^= 1) {
        double trace = 0.0;
        for (int j = 0; j < n; ++j) trace += s.matrix[now][j][j];
        for (int i = thread; i < n * n; i += kLanczosThreads) {
            double sum = 0.0;
            for (int j = 0; j < n; ++j) sum += s.matrix[now][i / n][j] / trace * (s.matrix[now][j][i % n] / trace);
            s.matrix[now ^ 1][i / n][i % n] = sum;
        }
        __syncthreads();
    }
    // 3) Its column with the largest diagonal element is y, and B y is x, up to their lengths.
    if (thread == 0 && alive) {
        int best = 0;
        for (int j = 1; j < n; ++j)
            if (s.matrix[now][j][j] > s.matrix[now][best][best]) best = j;
        double right = 0.0, left = 0.0;
        for (int j = 0; j < n; ++j) {
            s.right[j] = s.matrix[now][j][best];
            right += s.right[j] * s.right[j];
        }
        for (int j = 0; j < n; ++j) s.right[j] /= sqrt(right);
        for (int j = 0; j < n; ++j) {
            s.left[j] = d[j] / scale * s.right[j] + (j + 1 < n ? e[j + 1] / scale * s.right[j + 1] : 0.0);
            left += s.left[j] * s.left[j];
        }
        for (int j = 0; j < n; ++j) s.left[j] /= sqrt(left);
    }
    __syncthreads();
    // 4) The vectors; of a zero or not finite operator, equal elements.
    for (int side = 0; side < 2; ++side) {
        const int first = side == 0 ? span.start_first : span.image_first;
        const int length = side == 0 ? span.start_length : span.image_length;
        const double* weights = side == 0 ? s.right : s.left;
        for (int i = thread; i < length; i += kLanczosThreads) {
            double value = alive ? 0.0 : 1.0 / sqrt(static_cast<double>(length));
            for (int j = 0; alive && j < n; ++j) value += weights[j] * p.bases[side][j * p.sizes[side] + first + i];
            p.results[side][first + i] = static_cast<float>(value);
        }
    }
}

}  // namespace sn_fast
