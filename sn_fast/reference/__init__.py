"""The maths in plain PyTorch: fallback on every device without a kernel, and oracle of the tests (float64-capable)."""
