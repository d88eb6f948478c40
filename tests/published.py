"""Layouts of the published outputs: TensorFlow's NHWC / HWIO, and its asymmetric SAME padding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: (before, after)."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def image(a: np.ndarray) -> Tensor:
    """NHWC -> NCHW."""
    return torch.from_numpy(np.ascontiguousarray(a.transpose(0, 3, 1, 2)))


def kernel(a: np.ndarray) -> Tensor:
    """HWIO -> OIHW."""
    return torch.from_numpy(np.ascontiguousarray(a.transpose(3, 2, 0, 1)))


def matrix(a: np.ndarray) -> Tensor:
    """[in, out] -> (out, in)."""
    return torch.from_numpy(np.ascontiguousarray(a.T))
