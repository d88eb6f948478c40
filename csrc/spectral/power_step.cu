#include "spectral/power_step.h"

#include "spectral/power_step.cuh"

namespace sn_fast {

std::vector<int> plan_struct_sizes() {
    return {static_cast<int>(sizeof(OperatorMap)), static_cast<int>(sizeof(WorkItem)),
            static_cast<int>(sizeof(VectorSlice))};
}

namespace {

// All but the input, of half step `h`.
HalfStepParams params_of(const PowerStep& step, int h) {
    const int count = static_cast<int>(step.weights.size());
    SN_CHECK(step.precision >= 0 && step.precision <= static_cast<int>(Precision::kBfloat16), "got ", step.precision);
    SN_CHECK(count <= kMaxOperators, count, " operators in one call");
    const std::size_t given = step.given[h].size();
    SN_CHECK(given == step.weights.size(), given, " vectors for ", count, " weights");
    HalfStepParams half{};
    half.precision = static_cast<Precision>(step.precision);
    half.table = step.table;
    half.partials = step.partials;
    half.changes = step.changes;
    half.n_operators = count;
    half.maps = step.maps + h * count;
    half.items = step.items + h * step.n_items[0];
    half.n_items = step.n_items[h];
    half.norms_out = step.norms[h];
    half.outputs = step.results[h];
    half.counters = step.counters;
    half.taken = step.counters + h;
    for (int i = 0; i < count; ++i) {
        half.weights[i] = reinterpret_cast<const void*>(step.weights[i]);
        half.given[i] = reinterpret_cast<const float*>(step.given[h][i]);
    }
    return half;
}

void zero_counters(const PowerStep& step, const Stream& stream) {
    fill_zero(step.counters, static_cast<std::size_t>(step.n_counters) * sizeof(std::int32_t), stream);
}

}  // namespace

void half_step(const PowerStep& step, int half, const Stream& stream) {
    SN_CHECK(half == 0 || half == 1, "got ", half);
    zero_counters(step, stream);
    launch_half_step(params_of(step, half), stream);
}

void power_step(const PowerStep& step, const Stream& stream) {
    SN_CHECK(step.targets || !(step.changes || step.copies.sigmas), "copies and choices are of a state in place");
    if (!step.counters_are_zero) zero_counters(step, stream);
    FinishParams finish{step.slices,
                        {step.results[0], step.results[1]},
                        {step.norms[0], step.norms[1]},
                        step.sigmas,
                        step.groups,
                        step.targets,
                        step.changes,
                        step.copies,
                        {}};
    // Where blocks of both fit on the device together; where they do not, early ones were seen to keep later ones waiting.
    const bool early = step.n_items[0] + step.n_items[1] <= parallel_blocks(stream.device);
    for (int h = 0; h < 2; ++h) {
        HalfStepParams half = params_of(step, h);
        half.inputs = h == 0 ? nullptr : step.results[0];
        half.norms_in = step.norms[0];
        launch_half_step(half, stream, early && h > 0);
        for (std::size_t i = 0; i < step.weights.size(); ++i)
            finish.given[1 - h][i] = reinterpret_cast<float*>(step.given[h][i]);
    }
    launch(power_step_finish, "finish", static_cast<unsigned>(step.n_slices), kFinishThreads, sizeof(FinishShared),
           stream, finish, true);
}

}  // namespace sn_fast
