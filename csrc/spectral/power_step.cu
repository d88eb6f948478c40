#include "spectral/power_step.h"

#include "spectral/power_step.cuh"

namespace sn_fast {

std::vector<int> plan_struct_sizes() {
    return {static_cast<int>(sizeof(Gather)), static_cast<int>(sizeof(Unit)), static_cast<int>(sizeof(Piece))};
}

void power_step(const PowerStep& step, const Stream& stream) {
    const int count = static_cast<int>(step.weights.size());
    SN_CHECK(step.precision >= 0 && step.precision <= static_cast<int>(Precision::kBfloat16), "got ", step.precision);
    SN_CHECK(count <= kMaxOperators, count, " operators in one call");
    SN_CHECK(step.given[0].size() == step.weights.size() && step.given[1].size() == step.weights.size(),
             step.given[0].size(), " and ", step.given[1].size(), " vectors for ", count, " weights");
    SN_CHECK(step.targets || !(step.changes || step.copies.sigmas), "copies and choices are of a state in place");
    if (!step.counters_are_zero)
        fill_zero(step.counters, static_cast<std::size_t>(step.n_counters) * sizeof(std::int32_t), stream);

    FinishParams finish{step.pieces, {step.results[0], step.results[1]}, {step.norms[0], step.norms[1]},
                        step.sigmas, step.groups, step.targets, step.changes, step.copies, {}};
    HalfStepParams half{};
    half.precision = static_cast<Precision>(step.precision);
    half.table = step.table;
    half.partials = step.partials;
    half.changes = step.changes;
    half.n_operators = count;
    for (int i = 0; i < count; ++i) {
        half.weights[i] = reinterpret_cast<const void*>(step.weights[i]);
        finish.given[0][i] = reinterpret_cast<float*>(step.given[1][i]);
        finish.given[1][i] = reinterpret_cast<float*>(step.given[0][i]);
    }
    for (int h = 0; h < 2; ++h) {
        half.gathers = step.gathers + h * count;
        half.units = step.units + h * step.n_units[0];
        half.n_units = step.n_units[h];
        half.inputs = h == 0 ? nullptr : step.results[0];
        half.norms_in = step.norms[0];
        half.norms_out = step.norms[h];
        half.outputs = step.results[h];
        half.counters = step.counters;
        half.taken = step.counters + h;
        for (int i = 0; i < count; ++i) half.given[i] = reinterpret_cast<const float*>(step.given[h][i]);
        launch_half_step(half, stream, h > 0);
    }
    launch(finish_kernel, "finish", static_cast<unsigned>(step.n_pieces), kFinishThreads, sizeof(FinishShared), stream,
           finish, true);
}

}  // namespace sn_fast
