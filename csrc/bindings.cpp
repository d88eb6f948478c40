// The compiled module's Python side: addresses, sizes and a stream in, nothing out. It knows no torch; sn_fast/ops
// checks tensors, allocates results, and is the only caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "attacks/pgd_step.h"
#include "attacks/random_start.h"
#include "attacks/wrm_step.h"
#include "core/launch.h"
#include "spectral/half_step.h"
#include "spectral/lanczos.h"
#include "spectral/normalize.h"
#include "spectral/refresh.h"
#ifdef SN_FAST_EMULATOR
#include "core/philox.cuh"
#endif

namespace py = pybind11;

namespace sn_fast {
namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

Stream stream_of(Address handle, int device) { return {pointer<std::remove_pointer_t<cudaStream_t>>(handle), device}; }

// -- attacks ---------------------------------------------------------------------------------------------------------

using BatchArg = std::tuple<long long, long long>;        // samples, elements of a sample
using ElementsArg = std::tuple<Address, int, long long>;  // address (0: none), dtype code, batch stride
using AmountArg = std::tuple<double, Address>;            // value; float32 per sample or 0
// Kind, address, and batch stride, inner, count, stride of the numbers; and the number that takes their place.
using BoundArg = std::tuple<int, Address, std::array<long long, 4>, double>;
using StreamArg = std::tuple<Address, int>;

Samples samples_of(const BatchArg& batch) { return {std::get<0>(batch), std::get<1>(batch)}; }

Elements elements_of(const ElementsArg& arg) {
    return {pointer<unsigned char>(std::get<0>(arg)), static_cast<Dtype>(std::get<1>(arg)), std::get<2>(arg), false};
}

Amount amount_of(const AmountArg& arg) {
    return {static_cast<float>(std::get<0>(arg)), pointer<const float>(std::get<1>(arg))};
}

Bound bound_of(const BoundArg& arg) {
    const auto [kind, address, sizes, number] = arg;
    const auto [batch_stride, inner, count, stride] = sizes;
    return {
        static_cast<Bound::Kind>(kind), elements_of({address, 0, batch_stride}), Divisor(inner), Divisor(count), stride,
        static_cast<float>(number)};
}

Stream stream_of(const StreamArg& arg) { return stream_of(std::get<0>(arg), std::get<1>(arg)); }

void register_attacks(py::module_& m) {
    m.def("pgd_step_partials", [](BatchArg batch, const std::vector<int>& codes, int norm, long long resident_bytes) {
        std::vector<Dtype> dtypes;
        for (int code : codes) dtypes.push_back(static_cast<Dtype>(code));
        return pgd_step_partials(samples_of(batch), dtypes, static_cast<Norm>(norm), resident_bytes);
    });
    m.def("pgd_step", [](BatchArg batch, ElementsArg out, ElementsArg x_adv, ElementsArg x, ElementsArg grad, int norm,
                         AmountArg eps, AmountArg alpha, BoundArg lower, BoundArg upper, Address active, bool targeted,
                         bool ball, Address partials, long long resident_bytes, StreamArg stream) {
        const Samples samples = samples_of(batch);
        PgdStep p;
        p.samples = samples;
        p.out = elements_of(out), p.x_adv = elements_of(x_adv);
        p.x = elements_of(x), p.grad = elements_of(grad);
        p.eps = amount_of(eps), p.alpha = amount_of(alpha);
        p.lower = bound_of(lower), p.upper = bound_of(upper);
        p.active = pointer<const bool>(active);
        p.targeted = targeted, p.ball = ball;
        p.partials = pointer<double>(partials);
        pgd_step(p, static_cast<Norm>(norm), resident_bytes, stream_of(stream));
    });
    m.def("wrm_step", [](BatchArg batch, ElementsArg out, ElementsArg x_adv, ElementsArg x, ElementsArg grad,
                         AmountArg eps, float step, BoundArg lower, BoundArg upper, StreamArg stream) {
        const Samples samples = samples_of(batch);
        wrm_step({samples, elements_of(out), elements_of(x_adv), elements_of(x), elements_of(grad), amount_of(eps),
                  step, bound_of(lower), bound_of(upper)},
                 stream_of(stream));
    });
    m.def("random_start", [](BatchArg batch, ElementsArg out, ElementsArg x, int norm, AmountArg eps, BoundArg lower,
                             BoundArg upper, Address seed, const std::vector<std::array<long long, 2>>& digits,
                             long long resident_bytes, StreamArg stream) {
        const Samples samples = samples_of(batch);
        LogicalIndex logical;  // digits: size and stride, fastest first
        SN_CHECK(digits.size() <= LogicalIndex::kMaxDigits, digits.size());
        for (const auto& [size, stride] : digits) {
            logical.sizes[logical.digits] = Divisor(size);
            logical.strides[logical.digits++] = stride;
        }
        random_start({samples, elements_of(out), elements_of(x), amount_of(eps), bound_of(lower), bound_of(upper),
                      pointer<const std::uint64_t>(seed), logical},
                     static_cast<Norm>(norm), resident_bytes, stream_of(stream));
    });
#ifdef SN_FAST_EMULATOR
    m.def("philox", [](std::array<std::uint32_t, 4> c, std::array<std::uint32_t, 2> k) {
        const PhiloxCounter drawn = philox({{c[0], c[1], c[2], c[3]}}, {{k[0], k[1]}});
        return std::array<std::uint32_t, 4>{drawn.words[0], drawn.words[1], drawn.words[2], drawn.words[3]};
    });
#endif
}

// -- spectral ---------------------------------------------------------------------------------------------------------

using Addresses = std::vector<Address>;
// Tables, number of units, weights, records; memory that is zeroed (sums, changes, arrived), its bytes; alarms, force,
// replaced.
using ContentArg = std::tuple<std::array<Address, 3>, int, Addresses, Addresses, std::array<Address, 3>, std::size_t,
                              Address, bool, float>;

Content content_of(const ContentArg& arg) {
    const auto& [tables, n_units, weights, records, zeroed, bytes, alarms, force, replaced] = arg;
    SN_CHECK(weights.size() <= kMaxOperators && records.size() == weights.size(), records.size(), " records of ",
             weights.size(), " weights in one call");
    Content c{};
    c.n_units = n_units, c.zeroed = pointer<void>(zeroed[0]), c.zeroed_bytes = bytes;
    FingerprintParams& p = c.params;
    p.words = pointer<const Words>(tables[0]), p.units = pointer<const WordsUnit>(tables[1]);
    p.table = pointer<const std::int32_t>(tables[2]);
    p.n_operators = static_cast<int>(weights.size()), p.force = force, p.replaced = replaced;
    p.sums = pointer<unsigned long long>(zeroed[0]), p.alarms = pointer<std::int32_t>(alarms);
    p.changes = pointer<std::int32_t>(zeroed[1]), p.arrived = pointer<std::int32_t>(zeroed[2]);
    for (std::size_t i = 0; i < weights.size(); ++i) {
        p.weights[i] = pointer<const void>(weights[i]);
        p.records[i] = pointer<std::int64_t>(records[i]);
    }
    return c;
}

void register_spectral(py::module_& m) {
    m.def("parallel_blocks", &parallel_blocks);
    m.def("plan_struct_sizes", &plan_struct_sizes);
    m.def("power_step", [](std::array<Address, 4> plan, std::array<int, 2> n_items, int n_slices, Addresses weights,
                           Addresses starts, Addresses others, std::array<Address, 2> results, Address sigmas,
                           Address groups, std::array<Address, 2> norms, Address partials, Address counters,
                           int n_counters, int precision, StreamArg stream) {
        PowerStep step{};
        step.maps = pointer<const OperatorMap>(plan[0]), step.items = pointer<const WorkItem>(plan[1]);
        step.slices = pointer<const VectorSlice>(plan[2]), step.table = pointer<const std::int32_t>(plan[3]);
        step.n_slices = n_slices;
        step.weights = std::move(weights);
        step.given[0] = std::move(starts), step.given[1] = std::move(others);
        for (int h = 0; h < 2; ++h) {
            step.n_items[h] = n_items[h];
            step.results[h] = pointer<float>(results[h]), step.norms[h] = pointer<double>(norms[h]);
        }
        step.sigmas = pointer<float>(sigmas), step.groups = pointer<std::int64_t>(groups);
        step.partials = pointer<float>(partials), step.counters = pointer<std::int32_t>(counters);
        step.n_counters = n_counters, step.precision = precision;
        power_step(step, stream_of(stream));
    });
    m.def("half_step", [](std::array<Address, 4> plan, std::array<int, 2> n_items, int half, Addresses weights,
                          Addresses vectors, Address result, Address norms, Address partials, Address counters,
                          int n_counters, int precision, StreamArg stream) {
        SN_CHECK(half == 0 || half == 1, "got ", half);
        PowerStep step{};
        step.maps = pointer<const OperatorMap>(plan[0]), step.items = pointer<const WorkItem>(plan[1]);
        step.table = pointer<const std::int32_t>(plan[3]);
        step.n_items[0] = n_items[0], step.n_items[1] = n_items[1];
        step.weights = std::move(weights);
        step.given[half] = std::move(vectors);
        step.results[half] = pointer<float>(result), step.norms[half] = pointer<double>(norms);
        step.partials = pointer<float>(partials), step.counters = pointer<std::int32_t>(counters);
        step.n_counters = n_counters, step.precision = precision;
        half_step(step, half, stream_of(stream));
    });
    py::class_<Refresh>(m, "Refresh", py::module_local())
        .def(py::init([](std::array<Address, 4> plan, std::array<int, 2> n_items, int n_slices, Addresses weights,
                         Addresses starts, Addresses others, Address targets, int n_counters, int precision) {
            Refresh r{};
            PowerStep& step = r.step;
            step.maps = pointer<const OperatorMap>(plan[0]), step.items = pointer<const WorkItem>(plan[1]);
            step.slices = pointer<const VectorSlice>(plan[2]), step.table = pointer<const std::int32_t>(plan[3]);
            step.n_items[0] = n_items[0], step.n_items[1] = n_items[1], step.n_slices = n_slices;
            step.targets = pointer<const Targets>(targets);
            step.n_counters = n_counters, step.precision = precision;
            step.weights = std::move(weights);
            step.given[0] = std::move(starts), step.given[1] = std::move(others);
            return r;
        }))
        // Results and norms of both half steps, partial sums, counters; copies: sigmas, both vectors, groups.
        .def("run", [](const Refresh& self, int n_iterations, std::array<Address, 2> results,
                       std::array<Address, 2> norms, Address partials, Address counters, std::array<Address, 4> copies,
                       const std::optional<ContentArg>& content, StreamArg stream) {
            Refresh r = self;
            for (int h = 0; h < 2; ++h) {
                r.step.results[h] = pointer<float>(results[h]), r.step.norms[h] = pointer<double>(norms[h]);
                r.copies.vectors[h] = pointer<float>(copies[1 + h]);
            }
            r.copies.sigmas = pointer<float>(copies[0]), r.copies.groups = pointer<std::int64_t>(copies[3]);
            r.step.partials = pointer<float>(partials), r.step.counters = pointer<std::int32_t>(counters);
            r.n_iterations = n_iterations;
            if (content) r.content = content_of(*content);
            refresh(std::move(r), stream_of(stream));
        });
    m.def("record_struct_sizes", &record_struct_sizes);
    m.def("record",
          [](const ContentArg& content, StreamArg stream) { record(content_of(content), stream_of(stream)); });
    m.def("lanczos", [](std::array<Address, 3> plan, std::array<int, 2> n_items, std::array<Address, 2> parts,
                        std::array<int, 2> n_parts, int n_iterations, Addresses weights,
                        std::array<std::vector<int>, 2> offsets, std::array<std::int64_t, 2> sizes,
                        std::array<Address, 2> bases, std::array<Address, 2> results, std::array<Address, 4> norms,
                        Address partials, Address counters, int n_counters, StreamArg stream) {
        Lanczos l;
        l.maps = pointer<const OperatorMap>(plan[0]), l.items = pointer<const WorkItem>(plan[1]);
        l.table = pointer<const std::int32_t>(plan[2]);
        l.n_iterations = n_iterations;
        l.weights = std::move(weights);
        for (std::size_t side = 0; side < 2; ++side) {
            l.parts[side] = pointer<const Part>(parts[side]), l.n_parts[side] = n_parts[side];
            l.n_items[side] = n_items[side], l.offsets[side] = std::move(offsets[side]), l.sizes[side] = sizes[side];
            l.bases[side] = pointer<float>(bases[side]), l.results[side] = pointer<float>(results[side]);
        }
        l.norms = pointer<double>(norms[0]);
        l.diagonal = pointer<double>(norms[1]), l.off_diagonal = pointer<double>(norms[2]);
        l.sums = pointer<double>(norms[3]);
        l.partials = pointer<float>(partials), l.counters = pointer<std::int32_t>(counters), l.n_counters = n_counters;
        lanczos(l, stream_of(stream));
    });
    // weights: (weight, result, sigma, elements, beta, cap, dtype code)
    using WeightArg = std::tuple<Address, Address, Address, std::int64_t, float, bool, int>;
    m.def("normalize", [](const std::vector<WeightArg>& weights, StreamArg stream) {
        std::vector<NormalizedWeight> all;
        for (const auto& [weight, result, sigma, count, beta, cap, dtype] : weights)
            all.push_back({pointer<const void>(weight), pointer<void>(result), pointer<const float>(sigma), count, beta,
                           cap, static_cast<Dtype>(dtype)});
        normalize(all, stream_of(stream));
    });
    m.def("normalize_backward_blocks", &normalize_backward_blocks);
    m.def("normalize_backward", [](std::array<Address, 3> grad_weight_result, std::array<int, 2> dtypes,
                                   std::int64_t count, Address sigma, Address x, Address y, Address top_group,
                                   std::array<Address, 2> plan, std::array<Address, 3> workspace,
                                   std::array<int, 5> sizes, float beta, bool cap, int precision, StreamArg stream) {
        NormalizeBackward p{};
        p.grad = pointer<const void>(grad_weight_result[0]), p.weight = pointer<const void>(grad_weight_result[1]);
        p.result = pointer<void>(grad_weight_result[2]);
        p.grad_dtype = static_cast<Dtype>(dtypes[0]), p.weight_dtype = static_cast<Dtype>(dtypes[1]);
        p.count = count;
        p.sigma = pointer<const float>(sigma), p.x = pointer<const float>(x), p.y = pointer<const float>(y);
        p.top_group = pointer<const std::int64_t>(top_group);
        p.map = pointer<const OperatorMap>(plan[0]), p.table = pointer<const std::int32_t>(plan[1]);
        p.inner_partials = pointer<double>(workspace[0]), p.partials = pointer<float>(workspace[1]);
        p.counters = pointer<std::int32_t>(workspace[2]);
        p.groups = sizes[0], p.rows = sizes[1], p.columns = sizes[2], p.taps = sizes[3], p.parts = sizes[4];
        p.beta = beta, p.cap = cap, p.precision = precision;
        normalize_backward(p, stream_of(stream));
    });
}

}  // namespace
}  // namespace sn_fast

#ifndef SN_FAST_MODULE
#define SN_FAST_MODULE _C
#endif

PYBIND11_MODULE(SN_FAST_MODULE, m) {
    using namespace sn_fast;
    m.doc() = "sn_fast's kernels. Arguments are checked in sn_fast.ops; use those operators instead.";
    m.attr("version") = SN_FAST_VERSION;
    m.attr("archs") = SN_FAST_ARCHS;
    m.attr("cuda_version") = SN_FAST_CUDA_VERSION;
    register_attacks(m);
    register_spectral(m);
#ifdef SN_FAST_EMULATOR
    m.def("set_thread_order", [](std::uint64_t seed) { emulator::thread_order() = seed; });
    m.def("set_parallel", [](int blocks) { emulator::parallel() = blocks; });
    m.def("set_tensor_core", [](int tf32_block, int bfloat16_block, int extra_bits) {
        emulator::tensor_core() = {tf32_block, bfloat16_block, extra_bits};
    });
    m.def("tensor_core", [] {
        const emulator::TensorCore& core = emulator::tensor_core();
        return std::tuple(core.tf32_block, core.bfloat16_block, core.extra_bits);
    });
#endif
}
