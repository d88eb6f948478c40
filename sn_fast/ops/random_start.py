"""The operator of random starts. Arguments are as in the reference, checked by ``attacks``."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..reference.random_start import random_start as _reference
from ..reference.samples import Bound
from .library import define, stream_of
from .update_arguments import RESIDENT_BYTES, check, like_first, norm_code, one_of, takes
from .update_layout import MAX_INDEX, Layout

_MAX_DIGITS = 8  # csrc/attacks/random_start.h: LogicalIndex


def random_start_by_kernel(
    module: ModuleType,
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Bound,
    upper: Bound,
    seed: Tensor,
) -> Tensor:
    """``random_start`` of checked arguments."""
    code = norm_code(norm)
    layout = Layout(x)
    digits = layout.digits()
    if not takes(x, x) or len(digits) > _MAX_DIGITS or (digits and layout.numel >= MAX_INDEX):
        return _reference(x, norm, eps, eps_per_sample, lower, upper, seed)
    if x.numel() == 0:
        return layout.result
    module.random_start(
        layout.sizes,
        layout.elements(layout.out),
        layout.elements(x),
        code,
        layout.amount(eps, eps_per_sample),
        layout.bound(lower),
        layout.bound(upper),
        seed.data_ptr(),
        digits,
        RESIDENT_BYTES // 2,
        stream_of(x.device),
    )
    return layout.finish()


def _random_start_kernel(
    module: ModuleType,
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    seed: Tensor,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    check(x, {}, {"eps_per_sample": eps_per_sample}, (lower, upper))
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(f"seed must be one int64 on {x.device}, got {seed.numel()} {seed.dtype} on {seed.device}")
    clip = (one_of(lower, low), one_of(upper, high))
    return random_start_by_kernel(module, x, norm, eps, eps_per_sample, *clip, seed)


random_start = define(
    "random_start(Tensor x, str norm, float eps, Tensor? eps_per_sample, Tensor? lower, Tensor? upper, Tensor seed,"
    " float? low=None, float? high=None) -> Tensor",
    _reference,
    like_first,
    _random_start_kernel,
)
