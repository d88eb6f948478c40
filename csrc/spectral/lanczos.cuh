// The kernels of the Lanczos start: one block per part of a group's vectors.
#pragma once

#include "spectral/lanczos.h"
#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kLanczosThreads = 512;

// A new vector is made orthogonal to those before it and a unit vector in four launches, each of which begins with the
// sums over all parts that the one before left.
enum class Pass : int {
    kMeasure = 0,   // inner products with the vectors before it, and its square sum
    kSubtract = 1,  // Gram and Schmidt; inner products once more
    kAgain = 2,     // Gram and Schmidt, twice, which is enough; its square sum
    kScale = 3,
};

struct OrthogonalizeParams {
    const Part* parts;
    float* basis;
    double* norms;  // [span][n_iterations]
    double* sums;   // [pass][part][n_iterations + 1]: inner products with vectors before `index`, there the square sum
    std::int64_t size;
    int index;  // of the new vector in the basis
    int n_iterations;
    Pass pass;
};

struct OrthogonalizeShared {
    double coefficients[kMaxLanczos];
    double scratch[kLanczosThreads / kWarp];
};

// Where only rounding is left, the span is exhausted: the vector and its length become zero.
__global__ void __launch_bounds__(kLanczosThreads, 1) lanczos_orthogonalize(OrthogonalizeParams p) {
    OrthogonalizeShared& s = shared_memory<OrthogonalizeShared>();
    const Part part = p.parts[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
    const std::int64_t columns = p.n_iterations + 1, of_pass = gridDim.x * columns;
    float* x = p.basis + p.index * p.size + part.first;
    // One sum over all parts of the group, in every lane of the warp.
    auto total = [&](Pass pass, int column) {
        const double* sums = p.sums + static_cast<int>(pass) * of_pass +
                             (static_cast<std::int64_t>(blockIdx.x) - part.number) * columns + column;
        double sum = 0.0;
        for (int i = thread % kWarp; i < part.parts; i += kWarp) sum += sums[i * columns];
        return warp_reduce(sum, Add{});
    };
    if (p.pass == Pass::kScale) {
        // 1) A unit vector, in the end.
        const double before = total(Pass::kMeasure, p.index);
        const double after = p.index > 0 ? total(Pass::kAgain, p.index) : before;
        const Scale scale = inverse_norm(after);
        const bool alive = scale.alive && after > 4e-12 * before;
        for (int i = thread; i < part.length; i += kLanczosThreads)
            x[i] = alive ? x[i] * scale.first * scale.second : 0.0f;
        if (thread == 0 && part.number == 0 && p.norms != nullptr)
            p.norms[part.span * p.n_iterations + p.index] = alive ? sqrt(after) : 0.0;
        return;
    }
    if (p.pass != Pass::kMeasure) {
        // 2) What lies along the vectors before is taken away.
        for (int j = warp; j < p.index; j += kLanczosThreads / kWarp) {
            const double sum = total(static_cast<Pass>(static_cast<int>(p.pass) - 1), j);
            if (thread % kWarp == 0) s.coefficients[j] = sum;
        }
        __syncthreads();
        for (int i = thread; i < part.length; i += kLanczosThreads) {
            double value = x[i];
            for (int j = 0; j < p.index; ++j) value -= s.coefficients[j] * p.basis[j * p.size + part.first + i];
            x[i] = static_cast<float>(value);
        }
    }
    // 3) This part of the next sums. Every thread reads what it has written itself.
    auto store = [&](int column, double sum) {
        sum = block_reduce(sum, Add{}, s.scratch);
        if (thread == 0) p.sums[static_cast<int>(p.pass) * of_pass + blockIdx.x * columns + column] = sum;
    };
    for (int j = 0; j < p.index && p.pass != Pass::kAgain; ++j) {
        const float* b = p.basis + j * p.size + part.first;
        double sum = 0.0;
        for (int i = thread; i < part.length; i += kLanczosThreads) sum += static_cast<double>(b[i]) * x[i];
        store(j, sum);
    }
    if (p.pass == Pass::kSubtract) return;
    double square_sum = 0.0;
    for (int i = thread; i < part.length; i += kLanczosThreads) square_sum += squared(x[i]);
    store(p.index, square_sum);
}

struct CombineParams {
    const Part* parts;
    const float* basis;
    float* result;
    const double* diagonal;
    const double* off_diagonal;
    std::int64_t size;
    bool is_image;
    int n_iterations;
};

struct CombineShared {
    double matrix[2][kMaxLanczos][kMaxLanczos];
    double right[kMaxLanczos], left[kMaxLanczos];
    double scratch[kLanczosThreads / kWarp];
};

constexpr int kSquarings = 30;

// The leading singular vectors of the bidiagonal matrix B of one span, and with them a part of one of the operator's.
__global__ void __launch_bounds__(kLanczosThreads) lanczos_combine(CombineParams p) {
    CombineShared& s = shared_memory<CombineShared>();
    const Part part = p.parts[blockIdx.x];
    const int thread = static_cast<int>(threadIdx.x), n = p.n_iterations;
    const double* d = p.diagonal + part.span * n;
    const double* e = p.off_diagonal + part.span * n;  // e[j] couples vector j with j - 1
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
    // 4) The vector; of a zero or not finite operator, equal elements.
    const double* weights = p.is_image ? s.left : s.right;
    for (int i = thread; i < part.length; i += kLanczosThreads) {
        double value = alive ? 0.0 : 1.0 / sqrt(static_cast<double>(part.whole));
        for (int j = 0; alive && j < n; ++j) value += weights[j] * p.basis[j * p.size + part.first + i];
        p.result[part.first + i] = static_cast<float>(value);
    }
}

}  // namespace sn_fast
