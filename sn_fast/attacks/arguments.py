"""Arguments of the attacks, checked, and brought into the form that the operators take.

Numbers are always checked. What a tensor holds is checked only with ``check_values``: on a GPU that waits for the
device, so the attacks do it once per call, and the step functions never.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..reference.linear_map import compute_dtype

Bound = float | Tensor | Sequence[float]
Clip = tuple[Bound, Bound] | None

_NORMS = ("inf", "2", "1", "1-exact")
_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class Amount:
    """eps or alpha as the operators take it: one value, or one per sample, (B,), which then takes its place."""

    value: float
    per_sample: Tensor | None = None

    def scaled(self, factor: float) -> Amount:
        return Amount(factor * self.value, None if self.per_sample is None else factor * self.per_sample)


def canonical_norm(norm: float | str) -> str:
    """inf, "inf", "Linf", 2, "2", "L2", 1, "1", "L1", "L1-exact" and the like as "inf", "2", "1" or "1-exact"."""
    key = norm.lower().removeprefix("l").lstrip("_") if isinstance(norm, str) else _number_text(norm)
    if key not in _NORMS:
        raise ValueError(f'norm={norm!r} is unknown; choose inf, 2, 1 (the radial l1 of the paper) or "L1-exact"')
    return key


def _number_text(value: Any) -> str:
    return f"{float(value):g}" if isinstance(value, Real) and not isinstance(value, bool) else repr(value)


def check_samples(x: Tensor) -> None:
    """x is a batch of floating-point samples, (B, *size)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {x.dtype}; convert it first, for instance with x.float() / 255")
    if x.dim() < 2:
        raise ValueError(
            f"x of shape {tuple(x.shape)} needs a batch dimension and one more; use x[None] for one sample"
        )
    if math.prod(x.shape[1:]) == 0:
        raise ValueError(f"x of shape {tuple(x.shape)} has samples without elements")


def check_like(name: str, t: Tensor, x: Tensor, *, any_dtype: bool = False) -> None:
    """t has the shape, device and dtype of x (``any_dtype``: some floating dtype)."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    if t.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, x has {tuple(x.shape)}; they must be equal")
    _check_device(name, t, x)
    if not t.dtype.is_floating_point or (t.dtype != x.dtype and not any_dtype):
        raise TypeError(f"{name} has dtype {t.dtype}, x has {x.dtype}; convert it with {name}.to(x.dtype)")


def check_per_sample(name: str, t: Tensor, x: Tensor) -> None:
    """t has one value per sample, (B,), on x's device."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
    _check_length(name, t, x)
    _check_device(name, t, x)


def check_labels(y: Tensor, x: Tensor, *, class_indices: bool) -> None:
    """y has one entry per sample; a class index if ``class_indices``."""
    if not class_indices:
        if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
            raise ValueError(f"y must be a tensor with one entry for each of the {x.shape[0]} samples of x")
        return
    check_per_sample("y", y, x)
    if y.dtype not in _INDEX_DTYPES:
        raise TypeError(f"y must hold class indices, got {y.dtype}; convert it with y.long(), or give a callable loss")


def _check_length(name: str, t: Tensor, x: Tensor) -> None:
    if t.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, must be ({x.shape[0]},): one value per sample of x")


def _check_device(name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, x on {x.device}; move it with {name}.to(x.device)")


def check_count(name: str, value: int) -> int:
    """An integer >= 1."""
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if count < 1:
        raise ValueError(f"{name}={value!r} must be >= 1")
    return count


def number(name: str, value: float, *, finite: bool) -> float:
    """A number >= 0."""
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value >= 0 or (finite and value == math.inf):
        raise ValueError(f"{name}={value} must be >= 0" + finite * " and finite")
    return float(value)


def amount(name: str, value: float | Tensor, x: Tensor, *, finite: bool, check_values: bool) -> Amount:
    """A number >= 0, or one per sample, which is moved to x's device and to the precision of the maths."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number or a tensor of shape (B,), got {type(value).__name__}")
        return Amount(number(name, value, finite=finite))
    if value.dim() == 0:
        value = value.expand(x.shape[0])
    _check_length(name, value, x)
    per_sample = value.detach().to(x.device, compute_dtype(x))
    if check_values:
        valid = per_sample >= 0
        if finite:
            valid &= per_sample < math.inf
        if not bool(valid.all()):
            raise ValueError(f"{name} has elements that are not >= 0" + finite * " and finite")
    return Amount(0.0, per_sample)


def bounds(clip: Clip, x: Tensor, *, check_values: bool) -> tuple[Tensor | None, Tensor | None]:
    """clip = (lower, upper) as two tensors that broadcast to x."""
    if clip is None:
        return None, None
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ValueError(f"clip={clip!r} must be a pair (lower, upper) of numbers or per-channel tensors, or None")
    lower, upper = (per_channel("clip", bound, x) for bound in clip)
    if isinstance(clip[0], Real) and isinstance(clip[1], Real):
        if not clip[0] <= clip[1]:
            raise ValueError(f"clip={clip!r}: the lower bound must not be above the upper, and neither may be NaN")
    elif check_values and not bool((lower <= upper).all()):
        raise ValueError("clip: no element of the lower bound may be above the upper, or NaN")
    return lower, upper


def per_channel(name: str, value: Bound, x: Tensor) -> Tensor:
    """A number, one number per channel, or a tensor that broadcasts to x, as a tensor that does."""
    dtype = compute_dtype(x)
    if isinstance(value, Real):
        return x.new_full((), float(value), dtype=dtype)  # a fill, so that the host need not wait for a copy
    tensor = torch.as_tensor(value, dtype=dtype, device=x.device).detach()
    if tensor.dim() == 1:
        tensor = tensor.reshape(-1, *[1] * (x.dim() - 2))
    try:
        fits = torch.broadcast_shapes(tensor.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to x of shape {tuple(x.shape)}; "
            f"give a number, {x.shape[1]} numbers (one per channel), or a tensor of x's size"
        )
    return tensor


def normalisation(mean: Bound | None, std: Bound | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """mean and std as tensors of x's dtype that broadcast to x."""
    shift, scale = (
        None if value is None else per_channel(name, value, x).to(x.dtype)
        for name, value in (("mean", mean), ("std", std))
    )
    if scale is not None and (std == 0 if isinstance(std, Real) else not bool((scale != 0).all())):
        raise ValueError("std has a 0; samples cannot be divided by it")
    return shift, scale
