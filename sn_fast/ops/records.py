"""Records of weights by kernels: what content each has, hashed and compared on its device (see ``fingerprint``)."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from .layout import memory_digits
from .library import dtype_code
from .tables import Tables

SAMPLE = 1024  # words that a record keeps beside the hash, to tell a replaced weight from a trained one
SPREAD = 40507  # a prime, so no layer's sizes share a divisor with it
REPLACED = 0.4  # share of a weight's norm that is no multiple of the old weight: then it counts as another weight

_MAX_DIGITS = 6  # csrc/spectral/fingerprint.h: kWordDigits
_UNIT = 8192  # elements that one block reads
# csrc/spectral/fingerprint.h: the same fields in the same order.
_WORDS = np.dtype(
    [(n, "<i4") for n in ("dtype", "units", "samples", "sample", "digits")]
    + [(n, "<i4", _MAX_DIGITS) for n in ("size", "stride")]
)
_WORDS_UNIT = np.dtype([(n, "<i4") for n in ("op", "first", "count")])

_HOSTS = frozenset({"cpu"})


def is_on_host(device: torch.device) -> bool:
    """Whether the host compares a weight with its record; else only the device does, and the host does not wait."""
    return device.type in _HOSTS


Weight = tuple[torch.Size, tuple[int, ...], torch.dtype]


def length_of(numel: int) -> int:
    """Elements of a record, in int64: the hash, and the sampled words."""
    return 1 + -(-numel // _step(numel)) if numel else 1


def _step(numel: int) -> int:
    return max(1, -(-numel // SAMPLE))


def sampled(numel: int) -> np.ndarray:
    """Logical indices of the sampled words: one of every stretch, at a place that differs."""
    step = _step(numel)
    starts = np.arange(0, numel, step)
    return np.minimum(starts + starts // step * SPREAD % step, numel - 1)


class RecordPlan:
    """Tables of a list of weights: how their memory is read."""

    def __init__(self, module: ModuleType, weights: Sequence[Weight], device: torch.device) -> None:
        sizes = [_WORDS.itemsize, _WORDS_UNIT.itemsize]
        if module.record_struct_sizes() != sizes:
            raise RuntimeError(
                f"record structs differ: {sizes} here, {module.record_struct_sizes()} in the compiled module"
            )
        words = np.zeros(len(weights), _WORDS)
        units: list[tuple[int, int, int]] = []
        places: list[np.ndarray] = []
        for i, (shape, stride, dtype) in enumerate(weights):
            code, numel = dtype_code(torch.empty(0, dtype=dtype)), math.prod(shape)
            assert code is not None
            digits = memory_digits(shape, sorted(range(len(shape)), key=lambda d: stride[d]))
            firsts = np.arange(0, numel, _UNIT)
            row = words[i]
            row["dtype"], row["units"], row["digits"] = code, len(firsts), len(digits)
            for d, (size, step) in enumerate(digits):
                row["size"][d], row["stride"][d] = size, step
            units += [(i, first, min(_UNIT, numel - first)) for first in firsts.tolist()]
            index = np.array(np.unravel_index(sampled(numel), shape))
            row["sample"], row["samples"] = sum(len(p) for p in places), index.shape[1]
            places.append(np.array(stride, np.int64) @ index)
        self.n_units = len(units)
        table = np.concatenate(places).astype(np.int32)
        self.tables = Tables([words, np.array(units, _WORDS_UNIT), table], device)
        self.device = device
        self.n = len(weights)
        # Sums, changes with their number, arrived: what is zero at the start.
        self.zeroed = (0, 8 * self.n, 8 * self.n + 4 * (self.n + 1))
        self.zeroed_bytes = 8 * self.n + 4 * (self.n + 1) + 4 * self.n


def record_plan(module: ModuleType, weights: Sequence[Tensor]) -> RecordPlan | None:
    """None where the kernels do not take a weight: another dtype, not dense, empty, or of 2^31 elements."""
    for w in weights:
        if dtype_code(w) is None or not 0 < w.numel() < 2**31 or not is_dense(w) or w.dim() > _MAX_DIGITS:
            return None
    return _plan(module, tuple((w.shape, w.stride(), w.dtype) for w in weights), weights[0].device)


@functools.lru_cache(maxsize=512)
def _plan(module: ModuleType, weights: tuple[Weight, ...], device: torch.device) -> RecordPlan:
    return RecordPlan(module, weights, device)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one block of memory, in whatever order of the axes."""
    return t.is_contiguous() or torch.empty_like(t, device="meta").stride() == t.stride()
