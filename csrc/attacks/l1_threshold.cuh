// By how much the magnitudes of a sample must shrink, stopping at 0, for their sum to be eps: without sorting them.
#pragma once

#include "core/reduce.cuh"

namespace sn_fast {

// `visit(body)` calls body(|element|) for each of this thread's elements; their sum over the block is `total` > eps,
// there are `count`, and `largest` is the largest.
//
// f(t) = sum of max(|element| - t, 0) - eps is convex and falls, so Newton's step from anywhere ends left of its root:
// t' = (sum - eps) / count over the elements above t. It is exact once these elements are the right ones (Michelot
// 1986). A second probe, in the middle, halves what is left of the bracket in each pass, whatever the elements are:
// after kPasses passes it is below the rounding of float64.
template <class Visit>
__device__ double l1_threshold(const Visit& visit, double eps, double total, double count, double largest,
                               double* scratch) {
    constexpr int kPasses = 64;
    // The largest element loses no more than all together.
    double low = fmax((total - eps) / count, largest - eps), high = largest;
    for (int pass = 0; pass < kPasses; ++pass) {
        // 1) Sum and number of the elements above the left end and above the middle of the bracket.
        const double middle = low + 0.5 * (high - low);
        double sums[4] = {0.0, 0.0, 0.0, 0.0};
        visit([&](double magnitude) {
            if (magnitude > low) sums[0] += magnitude, sums[1] += 1.0;
            if (magnitude > middle) sums[2] += magnitude, sums[3] += 1.0;
        });
        block_reduce(sums, Add{}, scratch);
        // 2) Newton's steps from both.
        if (sums[1] == 0.0) break;  // nothing is above: low is the largest element, eps is 0
        double next = (sums[0] - eps) / sums[1];
        if (sums[3] > 0.0) next = fmax(next, (sums[2] - eps) / sums[3]);
        if (sums[2] - sums[3] * middle < eps) high = middle;
        // 3) A step that does not move has arrived.
        if (!(next > low)) break;
        low = next;
    }
    return low;
}

}  // namespace sn_fast
