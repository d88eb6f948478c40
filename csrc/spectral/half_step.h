// A applied to one vector of every operator, or A^T, in one launch.
#pragma once

#include <cstdint>

#include "core/launch.h"
#include "spectral/plan.h"

namespace sn_fast {

constexpr int kMaxOperators = 200;  // of one launch: their pointers travel as kernel parameters, 4 KB at most

// How products are formed. Sums are always float32.
enum class Precision : int {
    kFloat32 = 0,
    kTf32 = 1,     // operands rounded to tf32
    kTf32x3 = 2,   // operands split in two tf32 parts: about float32's accuracy
    kBfloat16 = 3  // operands rounded to bfloat16
};

struct HalfStepParams {
    Precision precision;
    const OperatorMap* maps;
    const WorkItem* items;
    const std::int32_t* table;
    int n_items;
    const float* inputs;     // not yet normalised result of the step before; null: the given vectors are the input
    const double* norms_in;  // partial square sums of `inputs`
    double* norms_out;
    float* outputs;
    float* partials;
    std::int32_t* counters;       // 0 at the start, as `taken`
    std::int32_t* taken;          // counts the items that blocks have taken
    const std::int32_t* changes;  // per operator, 0: there is nothing to do; then how many have changed. Null: all have
    int n_operators;
    const void* weights[kMaxOperators];
    const float* given[kMaxOperators];  // what the vector is where there is nothing to normalise
};

static_assert(sizeof(HalfStepParams) <= 4096, "kernel parameters");

constexpr int kBlocksPerMultiprocessor = 3;  // leaves 168 registers a thread: enough not to spill

// `early`: the half step before it on the stream may still run.
void launch_half_step(const HalfStepParams& params, const Stream& stream, bool early = false);

// The kernel of one precision. Each is compiled in a file of its own, half_step_<precision>.cu, for that takes a minute.
template <Precision kPrecision>
void launch_half_step_in(const HalfStepParams& params, const Stream& stream, bool early);

// Blocks of its kernel that run at the same time on one device: what the plan divides the work by.
int parallel_blocks(int device);

}  // namespace sn_fast
