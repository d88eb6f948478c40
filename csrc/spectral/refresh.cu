#include "spectral/refresh.h"

namespace sn_fast {

std::vector<int> record_struct_sizes() {
    return {static_cast<int>(sizeof(Words)), static_cast<int>(sizeof(WordsUnit))};
}

void record(const Content& content, const Stream& stream) {
    fill_zero(content.zeroed, content.zeroed_bytes, stream);
    launch_fingerprint(content.params, content.n_units, stream);
}

void refresh(Refresh r, const Stream& stream) {
    // 1) Which weights have changed; their records are renewed.
    if (r.content) {
        record(*r.content, stream);
        r.step.changes = r.content->params.changes;
    }
    // 2) Their iterations, predicated on the device.
    for (int i = 0; i < r.n_iterations; ++i) {
        r.step.counters_are_zero = i == 0 && r.content;
        r.step.copies = i == r.n_iterations - 1 ? r.copies : Copies{};
        power_step(r.step, stream);
    }
}

}  // namespace sn_fast
