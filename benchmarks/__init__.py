"""Measurements: of the kernels on a GPU (``gpu_check``), and of their machine code, without one (``machine_code``)."""
