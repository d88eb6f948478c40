"""Everything that can be measured without a GPU, beside the peers: ``python -m benchmarks.cpu --help``."""
