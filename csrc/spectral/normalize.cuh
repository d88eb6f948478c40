// The kernels of normalisation and its gradient.
#pragma once

#include "spectral/normalize.h"
#include "spectral/product.cuh"
#include "spectral/tile.cuh"

namespace sn_fast {

constexpr int kNormalizeThreads = 256;
constexpr int kPacksPerThread = 4;
constexpr int kMaxWeights = 76;  // of one launch: they travel as kernel parameters, 4 KB at most

// What the weight is divided by. A zero weight stays as it is; NaN goes through.
__device__ inline float divisor_of(float sigma, float beta, bool cap) {
    const float ratio = sigma / beta;
    if (cap) return ratio > 1.0f || ratio != ratio ? ratio : 1.0f;
    return sigma == 0.0f ? 1.0f : ratio;
}

struct NormalizeParams {
    int n_weights;
    unsigned first_block[kMaxWeights];
    NormalizedWeight weights[kMaxWeights];
};

static_assert(sizeof(NormalizeParams) <= 4096, "kernel parameters");

template <class T>
__host__ __device__ constexpr std::int64_t elements_per_block() {
    return static_cast<std::int64_t>(kNormalizeThreads) * kPacksPerThread * Pack<T>::kCount;
}

template <class T>
__device__ void normalize_block(const NormalizedWeight& w, std::int64_t block) {
    constexpr int kVector = Pack<T>::kCount;
    const float divisor = divisor_of(*w.sigma, w.beta, w.cap);
    const T* weight = static_cast<const T*>(w.weight);
    T* result = static_cast<T*>(w.result);
    const std::int64_t begin = block * elements_per_block<T>();
    const std::int64_t end = min(w.count, begin + elements_per_block<T>());
    const int thread = static_cast<int>(threadIdx.x);
    const bool vectors = is_aligned(weight) && is_aligned(result) && end - begin == elements_per_block<T>();
    if (vectors) {
        // 1) Whole blocks, 16 bytes at a time, all loads before the first use.
        Pack<T> packs[kPacksPerThread];
        const std::int64_t first = begin + thread * kVector;
#pragma unroll
        for (int i = 0; i < kPacksPerThread; ++i)
            packs[i] = *reinterpret_cast<const Pack<T>*>(weight + first + i * kNormalizeThreads * kVector);
#pragma unroll
        for (int i = 0; i < kPacksPerThread; ++i) {
#pragma unroll
            for (int e = 0; e < kVector; ++e)
                packs[i].values[e] = from_float<T>(to_float(packs[i].values[e]) / divisor);
            *reinterpret_cast<Pack<T>*>(result + first + i * kNormalizeThreads * kVector) = packs[i];
        }
        return;
    }
    // 2) The last block of a weight, and weights that are not aligned.
    for (std::int64_t i = begin + thread; i < end; i += kNormalizeThreads)
        result[i] = from_float<T>(to_float(weight[i]) / divisor);
}

__global__ void __launch_bounds__(kNormalizeThreads) normalize_weights(NormalizeParams p) {
    // The weight that this block belongs to: the last whose first block is not behind it.
    int low = 0, high = p.n_weights - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (p.first_block[middle] <= blockIdx.x) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    const NormalizedWeight& w = p.weights[low];
    const std::int64_t block = blockIdx.x - p.first_block[low];
    switch (w.dtype) {
        case Dtype::kFloat32: return normalize_block<float>(w, block);
        case Dtype::kFloat16: return normalize_block<half_t>(w, block);
        case Dtype::kBfloat16: return normalize_block<bfloat16_t>(w, block);
    }
}

// -- gradient ---------------------------------------------------------------------------------------------------------

constexpr int kInnerThreads = 256;

struct InnerShared {
    double scratch[kInnerThreads / kWarp];
};

__device__ inline float load(const void* data, Dtype dtype, std::int64_t i) {
    switch (dtype) {
        case Dtype::kFloat16: return to_float(static_cast<const half_t*>(data)[i]);
        case Dtype::kBfloat16: return to_float(static_cast<const bfloat16_t*>(data)[i]);
        default: return static_cast<const float*>(data)[i];
    }
}

// Four elements as float32, in one access where `vectors`.
template <class T>
__device__ inline void load_four(const void* data, std::int64_t i, float (&values)[4]) {
    struct alignas(4 * sizeof(T)) Four {
        T values[4];
    };
    const Four four = *reinterpret_cast<const Four*>(static_cast<const T*>(data) + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) values[e] = to_float(four.values[e]);
}

__device__ inline void load_four(const void* data, Dtype dtype, std::int64_t i, float (&values)[4]) {
    switch (dtype) {
        case Dtype::kFloat16: return load_four<half_t>(data, i, values);
        case Dtype::kBfloat16: return load_four<bfloat16_t>(data, i, values);
        default: return load_four<float>(data, i, values);
    }
}

constexpr int kGradientColumns = 64;  // (channel, tap) pairs of a tile
constexpr int kGradientDepth = kTileDepth<kGradientColumns>;

__host__ __device__ inline int pair_tiles(const NormalizeBackward& p) {
    return (p.columns * p.taps + kGradientColumns - 1) / kGradientColumns;
}

__host__ __device__ inline int tiles_of_group(const NormalizeBackward& p) {
    return (p.rows + kTileRows - 1) / kTileRows * pair_tiles(p);
}

// <G, W>, one partial sum per block; and zero for the counters of the next launch.
__global__ void __launch_bounds__(kInnerThreads) normalize_backward_dot(NormalizeBackward p) {
    InnerShared& s = shared_memory<InnerShared>();
    const int thread = static_cast<int>(threadIdx.x);
    const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kInnerThreads + thread;
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kInnerThreads;
    if (p.parts > 1)
        for (std::int64_t i = index; i < tiles_of_group(p); i += stride) p.counters[i] = 0;
    double sum = 0.0;
    const bool vectors =
        is_aligned(static_cast<const float*>(p.grad)) && is_aligned(static_cast<const float*>(p.weight));
    const std::int64_t fours = vectors ? p.count / 4 : 0;
    for (std::int64_t i = index; i < fours; i += stride) {
        float g[4], w[4];
        load_four(p.grad, p.grad_dtype, 4 * i, g);
        load_four(p.weight, p.weight_dtype, 4 * i, w);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum += static_cast<double>(g[e]) * static_cast<double>(w[e]);
    }
    for (std::int64_t i = 4 * fours + index; i < p.count; i += stride)
        sum += static_cast<double>(load(p.grad, p.grad_dtype, i)) * load(p.weight, p.weight_dtype, i);
    sum = block_reduce(sum, Add{}, s.scratch);
    if (thread == 0) p.inner_partials[blockIdx.x] = sum;
}

struct GradientShared {
    StagedTiles<kGradientColumns> tiles;
    std::int32_t channel[kGradientColumns];  // of each pair: start of its channel in x, or -1
    std::int32_t row[kGradientColumns];      // and of its tap in `position`
    // Of each tap: start of its slots' entries in the table; and where it reads for the positions of two chunks, or -1.
    std::int32_t entry[kGradientColumns][kAxes];
    std::int32_t position[2][kGradientColumns][kGradientDepth];
    std::int32_t last;
};

// One tile of the weight's gradient: 64 rows x 64 (channel, tap) pairs, the sum running over output positions.
__global__ void __launch_bounds__(kTileThreads, 3) normalize_backward_gradient(NormalizeBackward p) {
    constexpr int kLoads = kTileRows * kGradientDepth / kTileThreads, kStep = kTileThreads / kGradientDepth;
    GradientShared& s = shared_memory<GradientShared>();
    const OperatorMap& g = *p.map;
    const int thread = opaque_thread_index(), pairs = p.columns * p.taps;
    const int part = static_cast<int>(blockIdx.x) % p.parts, number = static_cast<int>(blockIdx.x) / p.parts;
    const int group = number / tiles_of_group(p), tile = number % tiles_of_group(p);
    const int first_pair = tile % pair_tiles(p) * kGradientColumns;
    const int first_row = tile / pair_tiles(p) * kTileRows;
    const float sigma = *p.sigma;
    TileProduct<kGradientColumns> product(static_cast<Precision>(p.precision), thread);

    // Where the divisor is the constant 1 nothing flows through sigma; of a group that does not attain it neither.
    const bool flows = p.cap ? sigma > p.beta : sigma > 0.0f;
    const bool active = flows && (p.top_group == nullptr || *p.top_group == group);
    if (active) {
        const int begin = static_cast<int>(static_cast<std::int64_t>(g.positions) * part / p.parts);
        const int end = static_cast<int>(static_cast<std::int64_t>(g.positions) * (part + 1) / p.parts);
        const int depth = thread % kGradientDepth, first = thread / kGradientDepth;
        const float* y = opaque(p.y + (static_cast<std::int64_t>(group) * p.rows + first_row) * g.positions);
        const float* x = opaque(p.x + static_cast<std::int64_t>(group) * p.columns * g.inputs);
        const int rows = p.rows - first_row, positions = g.positions, size1 = g.size[1], size2 = g.size[2];
        const int slots0 = g.slots[0], slots1 = g.slots[1], slots2 = g.slots[2];
        // 1) The pairs of the tile, and their taps: each once, unless there are more than pairs.
        const int taps = min(p.taps, kGradientColumns);
        if (thread < kGradientColumns) {
            const int pair = first_pair + thread, tap = taps < p.taps ? pair % p.taps : min(thread, taps - 1);
            s.channel[thread] = pair < pairs ? pair / p.taps * g.inputs : -1;
            s.row[thread] = taps < p.taps ? thread : pair % p.taps;
            s.entry[thread][0] = g.entry[0] + tap / (slots1 * slots2);
            s.entry[thread][1] = g.entry[1] + tap % (slots1 * slots2) / slots2;
            s.entry[thread][2] = g.entry[2] + tap % slots2;
        }
        __syncthreads();
        // Where all taps read for a chunk of positions.
        auto find_positions = [&](int at, int buffer) {
            const int position = at + depth;
            const bool inside = position < end;
            const int row0 = position / (size1 * size2) * slots0;
            const int row1 = position / size2 % size1 * slots1;
            const int row2 = position % size2 * slots2;
#pragma unroll 2
            for (int tap = first; tap < taps; tap += kStep) {
                int found = -1;
                if (inside) {
                    const int e0 = __ldg(p.table + (s.entry[tap][0] + row0));
                    const int e1 = __ldg(p.table + (s.entry[tap][1] + row1));
                    const int e2 = __ldg(p.table + (s.entry[tap][2] + row2));
                    found = (e0 | e1 | e2) >= 0 ? e0 + e1 + e2 : -1;
                }
                s.position[buffer][tap][depth] = found;
            }
        };
        float a[kLoads], b[kLoads];
        // All loads of a chunk are under way before the first is used.
        auto load_chunk = [&](int at, int buffer) {
            const int position = at + depth;
            const bool inside = position < end;
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int row = first + i * kStep;
                a[i] = inside && row < rows ? __ldg(y + (row * positions + position)) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int pair = first + i * kStep;
                const int channel = s.channel[pair], found = s.position[buffer][s.row[pair]][depth];
                b[i] = (channel | found) >= 0 ? __ldg(x + (channel + found)) : 0.0f;
            }
        };
        auto stage = [&](int buffer) {
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                s.tiles.a[buffer][depth][swizzled(first, depth) + i * kStep] = a[i];
                s.tiles.b[buffer][depth][first + i * kStep] = b[i];
            }
        };
        // 2) Chunk after chunk of positions. While one is multiplied the next travels, and that after it is looked up.
        if (begin < end) {
            find_positions(begin, 0);
            __syncthreads();
            load_chunk(begin, 0);
            find_positions(begin + kGradientDepth, 1);
            stage(0);
            __syncthreads();
            int buffer = 0;
            for (int next = begin + kGradientDepth;; next += kGradientDepth, buffer ^= 1) {
                const bool more = next < end;
                if (more) {
                    load_chunk(next, buffer ^ 1);
                    find_positions(next + kGradientDepth, buffer);
                }
                product.add(s.tiles.a[buffer], s.tiles.b[buffer]);
                if (!more) break;
                stage(buffer ^ 1);
                __syncthreads();
            }
        }
        if (p.parts > 1) {
            // Only one group's tiles are ever split, so all groups share their places.
            const std::int64_t partial = static_cast<std::int64_t>(tile) * p.parts * product.kSums * kTileThreads;
            const Split split{part, p.parts, p.partials + partial, p.counters + tile};
            if (!join_splits(product.sums, split, s.last)) return;
        }
    } else if (part != 0) {
        return;  // nothing to add up: the first part stores the tile
    }

    // 3) The whole formula, element by element.
    const double inner = flows ? sum_partials(p.inner_partials, normalize_backward_blocks(p.count)) / sigma : 0.0;
    const float divisor = divisor_of(sigma, p.beta, p.cap), factor = static_cast<float>(inner);
    const int rows = min(kTileRows, p.rows - first_row);
#pragma unroll
    for (int i = 0; i < product.kSums; ++i) {
        const int row = product.row(i), pair = first_pair + product.column(i);
        if (row >= rows || pair >= pairs) continue;
        const int at = (group * p.rows + first_row + row) * g.row_stride + pair / p.taps * g.channel_stride +
                       pair % p.taps * g.tap_stride;
        const float value = (load(p.grad, p.grad_dtype, at) - (active ? factor * product.sums[i] : 0.0f)) / divisor;
        switch (p.grad_dtype) {
            case Dtype::kFloat16: static_cast<half_t*>(p.result)[at] = from_float<half_t>(value); break;
            case Dtype::kBfloat16: static_cast<bfloat16_t*>(p.result)[at] = from_float<bfloat16_t>(value); break;
            default: static_cast<float*>(p.result)[at] = value;
        }
    }
}

}  // namespace sn_fast
