"""How kernels form products of float32 numbers."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Precision = Literal["fp32", "tf32", "3xtf32", "bf16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)  # csrc/spectral/half_step.h: Precision
_OF_MATMUL = {"highest": "fp32", "high": "tf32", "medium": "bf16"}  # torch.set_float32_matmul_precision


def resolved(precision: str) -> str:
    """One of ``PRECISIONS``; "auto" is what PyTorch's setting for matrix products says now."""
    if precision == "auto":
        return _OF_MATMUL[matmul_precision()]
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    return precision


def matmul_precision() -> str:
    """``torch.get_float32_matmul_precision``, which raises where torch.backends' fp32_precision was set to tf32."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"
