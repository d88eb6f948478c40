"""Operators for the tests of the kernels: chosen shapes, any geometry, and layouts of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from sn_fast import ConvOperator, LinearOperator, MatrixOperator

from ..layers.geometries import cases
from . import emulator

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def drawn(examples: int) -> settings:
    """Settings of a test with so many drawn cases; under sanitizers, which are slow, with a tenth of them."""
    few = examples // 10 if emulator.sanitizers_loaded() else examples
    return settings(max_examples=few, suppress_health_check=list(HealthCheck), deadline=None)


def conv(rows: int, columns: int, kernel: Sequence[int], size: Sequence[int], **options: Any) -> ConvOperator:
    return ConvOperator(torch.randn(rows, columns // options.get("groups", 1), *kernel), size, **options)


def matrix(rows: int, columns: int) -> MatrixOperator:
    return MatrixOperator(torch.randn(rows, columns))


def line(rows: int, columns: int, positions: int, kernel: int = 3) -> ConvOperator:
    """A convolution with as many outputs as inputs."""
    return conv(rows, columns, (kernel,), (positions,), padding="same")


def any_operator(draw: st.DrawFn, dtype: torch.dtype, *, one_matrix_in: int, largest: int) -> LinearOperator:
    """Convolutions of every geometry, as they are or reduced, with few or many channels, and matrices."""
    if draw(st.integers(0, one_matrix_in - 1)) == 0:
        rows, columns = (draw(st.sampled_from([1, 2, 7, 16, 17, 33, largest])) for _ in range(2))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
        return MatrixOperator(weight.to(dtype))
    case = draw(cases())
    factors = (draw(st.sampled_from([1, 1, 5, 12])) for _ in range(2))
    case = replace(case, cin=case.cin * next(factors), cout=case.cout * next(factors))
    op = case.operator(dtype)
    return op.reduced() if draw(st.booleans()) else op


def unaligned(t: Tensor, offset: int = 1) -> Tensor:
    return torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].reshape(t.shape).copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of a convolution's weight
    "contiguous": Tensor.contiguous,
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "unaligned": unaligned,
    "every_other_row": lambda w: torch.stack([w, w], dim=1)[:, 0],
    "every_other_tap": lambda w: torch.stack([w, w], dim=-1)[..., 0],
    "taps_transposed": lambda w: w.mT.contiguous().mT,
}
