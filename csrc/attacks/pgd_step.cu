// Chooses between the kernels of a step by sizes alone, and starts them.
#include "attacks/held_step.cuh"
#include "attacks/l1_clip_step.cuh"

#include <algorithm>

namespace sn_fast {
namespace {

constexpr long long kChunksPerTile = 4 * kChunkThreads;
constexpr long long kMaxTiles = 1024;  // of one sample: every block of the last launch adds all of them up

long long divided_up(long long a, long long b) { return (a + b - 1) / b; }

// Of a sample on chip.
long long shared_bytes(const Samples& samples, const std::vector<Dtype>& dtypes) {
    long long words = 0;
    for (Dtype dtype : dtypes) words += words_of(dtype);
    return static_cast<long long>(sizeof(SampleBlock)) + 16 * words * samples.chunks;
}

long long shared_bytes(const PgdStep& p) {
    std::vector<Dtype> dtypes{p.x_adv.dtype};
    if (p.ball) dtypes.push_back(p.x.dtype);
    if (p.grad.address) dtypes.push_back(p.grad.dtype);
    return shared_bytes(p.samples, dtypes);
}

struct Tiling {
    long long tiles, chunks_per_tile;
};

Tiling tiling_of(const Samples& samples) {
    const long long chunks_per_tile = std::max(kChunksPerTile, divided_up(samples.chunks, kMaxTiles));
    return {divided_up(samples.chunks, chunks_per_tile), chunks_per_tile};
}

unsigned checked_blocks(long long blocks) {
    SN_CHECK(blocks < (1ll << 31), blocks, " thread blocks are too many for one launch; split the batch");
    return static_cast<unsigned>(blocks);
}

}  // namespace

long long pgd_step_partials(const Samples& samples, const std::vector<Dtype>& dtypes, Norm norm,
                            long long resident_bytes) {
    if (norm == Norm::kInf || norm == Norm::kL1Exact || shared_bytes(samples, dtypes) <= resident_bytes) return 0;
    return samples.count * tiling_of(samples).tiles * kSums;
}

void pgd_step(PgdStep p, Norm norm, long long resident_bytes, const Stream& stream) {
    find_vectors(p.samples, {&p.out, &p.x_adv, &p.x, &p.grad, &p.lower.elements, &p.upper.elements});
    // 1) inf: elements are independent.
    if (norm == Norm::kInf)
        return launch(pgd_step_inf, "pgd_step_inf", chunk_blocks(p.samples), kChunkThreads, 0, stream, p);
    // 2) A block per sample. Few threads with several chunks each leave room for more blocks: one waits, others compute.
    const bool resident = shared_bytes(p) <= resident_bytes;
    const auto per_sample = [&](void (*kernel)(PgdStep), const char* name, int chunks_per_thread, long long shared) {
        const long long warps = divided_up(p.samples.chunks, kWarp * chunks_per_thread);
        const int threads = static_cast<int>(std::min<long long>(kMaxThreads, warps * kWarp));
        launch(kernel, name, checked_blocks(p.samples.count), threads, static_cast<std::size_t>(shared), stream, p);
    };
    const long long shared = resident ? shared_bytes(p) : static_cast<long long>(sizeof(SampleBlock));
    if (norm == Norm::kL1Exact) {
        SN_CHECK(p.samples.size < (1ll << 32), "samples of ", p.samples.size, " elements");
        const int each = resident ? 3 : 1;
        if (p.grad.address && (p.lower.kind != Bound::Kind::kNone || p.upper.kind != Bound::Kind::kNone))
            return per_sample(resident ? pgd_step_l1_clip<true> : pgd_step_l1_clip<false>, "pgd_step_l1_clip", each,
                              shared);
        return per_sample(resident ? pgd_step_sample<Norm::kL1Exact, true> : pgd_step_sample<Norm::kL1Exact, false>,
                          "pgd_step_sample", each, shared);
    }
    // 3) 2 and 1, on chip: in registers if they are of float32, since these hold 16-bit numbers as wide.
    if (resident && p.x_adv.dtype == Dtype::kFloat32 && p.samples.chunks <= kHeldChunks * kHeldThreads)
        return per_sample(norm == Norm::kL2 ? pgd_step_held<Norm::kL2> : pgd_step_held<Norm::kL1>, "pgd_step_held",
                          kHeldChunks, sizeof(SampleBlock));
    if (resident)
        return per_sample(norm == Norm::kL2 ? pgd_step_l2_sample : pgd_step_sample<Norm::kL1, true>, "pgd_step_sample",
                          6, shared);
    // 4) 2 and 1, in tiles. A launch whose sums nobody reads is left out.
    SN_CHECK(p.partials != nullptr, "a sample of ", p.samples.size, " elements does not fit on chip");
    const Tiling tiling = tiling_of(p.samples);
    p.tiles = tiling.tiles;
    p.chunks_per_tile = tiling.chunks_per_tile;
    const unsigned blocks = checked_blocks(p.samples.count * p.tiles);
    const auto start = [&](void (*kernel)(PgdStep), const char* name) {
        launch(kernel, name, blocks, kChunkThreads, sizeof(TileBlock), stream, p);
    };
    if (norm == Norm::kL2) {
        if (p.grad.address || p.ball) start(pgd_step_l2_sums, "pgd_step_l2_sums");
        return start(pgd_step_apply<Norm::kL2>, "pgd_step_apply");
    }
    if (p.grad.address) start(pgd_step_l1_gradient, "pgd_step_l1_gradient");
    if (p.ball) start(pgd_step_l1_distance, "pgd_step_l1_distance");
    start(pgd_step_apply<Norm::kL1>, "pgd_step_apply");
}

}  // namespace sn_fast
