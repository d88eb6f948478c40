#include "spectral/normalize.h"

#include <algorithm>

#include "spectral/normalize.cuh"

namespace sn_fast {

void normalize(const std::vector<NormalizedWeight>& weights, const Stream& stream) {
    for (std::size_t begin = 0; begin < weights.size(); begin += kMaxWeights) {
        NormalizeParams params{};
        unsigned blocks = 0;
        params.n_weights = static_cast<int>(std::min<std::size_t>(kMaxWeights, weights.size() - begin));
        for (int i = 0; i < params.n_weights; ++i) {
            const NormalizedWeight& w = weights[begin + static_cast<std::size_t>(i)];
            params.weights[i] = w;
            params.first_block[i] = blocks;
            dispatch(w.dtype, [&](auto element) {
                const std::int64_t size = elements_per_block<decltype(element)>();
                blocks += static_cast<unsigned>((w.count + size - 1) / size);
            });
        }
        launch(normalize_weights, "normalize", blocks, kNormalizeThreads, 0, stream, params);
    }
}

void normalize_backward(const NormalizeBackward& backward, const Stream& stream) {
    SN_CHECK(backward.precision >= 0 && backward.precision <= static_cast<int>(Precision::kBfloat16), "got ",
             backward.precision);
    launch(normalize_backward_dot, "normalize_backward (inner product)",
           static_cast<unsigned>(normalize_backward_blocks(backward.count)), kInnerThreads, sizeof(InnerShared), stream,
           backward);
    const unsigned blocks = static_cast<unsigned>(backward.groups * tiles_of_group(backward) * backward.parts);
    launch(normalize_backward_gradient, "normalize_backward (weight gradient)", blocks, kTileThreads,
           sizeof(GradientShared), stream, backward);
}

}  // namespace sn_fast
