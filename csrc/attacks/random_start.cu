#include "attacks/random_start.cuh"

namespace sn_fast {

void random_start(RandomStart start, Norm norm, long long resident_bytes, const Stream& stream) {
    find_vectors(start.samples, {&start.out, &start.x, &start.lower.elements, &start.upper.elements});
    if (norm == Norm::kInf) {
        const unsigned blocks = chunk_blocks(start.samples);
        return launch(random_start_inf, "random_start_inf", blocks, kChunkThreads, 0, stream, start);
    }
    SN_CHECK(start.samples.count < (1ll << 31), "a batch of ", start.samples.count, " samples; split it");
    const long long bytes = static_cast<long long>(sizeof(RandomStartBlock)) + 4 * kChunk * start.samples.chunks;
    start.keeps_point = bytes <= resident_bytes;
    const std::size_t shared = start.keeps_point ? static_cast<std::size_t>(bytes) : sizeof(RandomStartBlock);
    launch(norm == Norm::kL2 ? random_start_sample<Norm::kL2> : random_start_sample<Norm::kL1>, "random_start_sample",
           static_cast<unsigned>(start.samples.count), kChunkThreads, shared, stream, start);
}

}  // namespace sn_fast
