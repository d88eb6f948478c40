#include "spectral/lanczos.h"

#include "spectral/half_step.h"
#include "spectral/lanczos.cuh"

namespace sn_fast {

void lanczos(const Lanczos& l, const Stream& stream) {
    SN_CHECK(l.n_iterations >= 1 && l.n_iterations <= kMaxLanczos, "got ", l.n_iterations);
    HalfStepParams half{};
    half.precision = Precision::kFloat32;
    half.table = l.table;
    half.partials = l.partials;
    half.counters = half.taken = l.counters;
    half.norms_out = l.norms;
    for (std::size_t i = 0; i < l.weights.size(); ++i) half.weights[i] = reinterpret_cast<const void*>(l.weights[i]);

    const auto orthogonalize = [&](int side, int index) {
        double* norms = side == 1 ? l.diagonal : index > 0 ? l.off_diagonal : nullptr;
        OrthogonalizeParams params{l.parts[side], l.bases[side], norms,          l.sums,
                                   l.sizes[side], index,         l.n_iterations, Pass::kMeasure};
        for (Pass pass : {Pass::kMeasure, Pass::kSubtract, Pass::kAgain, Pass::kScale}) {
            if (index == 0 && (pass == Pass::kSubtract || pass == Pass::kAgain)) continue;  // nothing before it
            params.pass = pass;
            launch(lanczos_orthogonalize, "orthogonalize", static_cast<unsigned>(l.n_parts[side]), kLanczosThreads,
                   sizeof(OrthogonalizeShared), stream, params);
        }
    };
    // Vector `index` of one side, through A or A^T, to vector `to` of the other.
    const auto apply = [&](int side, int index, int to) {
        half.maps = l.maps + side * static_cast<std::ptrdiff_t>(l.weights.size());
        half.items = l.items + side * l.n_items[0];
        half.n_items = l.n_items[side];
        for (std::size_t i = 0; i < l.weights.size(); ++i)
            half.given[i] = l.bases[side] + index * l.sizes[side] + l.offsets[side][i];
        half.outputs = l.bases[1 - side] + to * l.sizes[1 - side];
        fill_zero(l.counters, static_cast<std::size_t>(l.n_counters) * sizeof(std::int32_t), stream);
        launch_half_step(half, stream);
    };

    orthogonalize(0, 0);
    for (int j = 0; j < l.n_iterations; ++j) {
        apply(0, j, j);
        orthogonalize(1, j);
        if (j + 1 == l.n_iterations) break;
        apply(1, j, j + 1);
        orthogonalize(0, j + 1);
    }
    for (int side = 0; side < 2; ++side)
        launch(lanczos_combine, "combine", static_cast<unsigned>(l.n_parts[side]), kLanczosThreads,
               sizeof(CombineShared), stream,
               CombineParams{l.parts[side], l.bases[side], l.results[side], l.diagonal, l.off_diagonal, l.sizes[side],
                             side == 1, l.n_iterations});
}

}  // namespace sn_fast
