"""Arguments of the attacks, checked, and brought into the form that the operators take.

Numbers are always checked. What a tensor holds is checked only with a ``Reading``: on a GPU that waits for the device,
so the attacks do it once per call, and the step functions never.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from ..reference.linear_map import compute_dtype
from .reading import Reading

Bound = float | Tensor | Sequence[float]
Clip = tuple[Bound | None, Bound | None] | None
OneBound = Tensor | float | None
"""A side of the clip as the operators take it."""
Norm = float | Literal["inf", "Linf", "linf", "2", "L2", "l2", "1", "L1", "l1", "L1-exact"]
"""``canonical_norm`` takes a few more spellings."""

_NORMS = ("inf", "2", "1", "1-exact")
_SPELLINGS = {math.inf: "inf", "Linf": "inf", 2: "2", "L2": "2", 1: "1", "L1": "1", "L1-exact": "1-exact"}  # usual ones
_LARGEST = torch.finfo(torch.float32).max
_MOST_FILLS = 64  # numbers, one per channel, beyond which a copy is the smaller evil
_MARGIN = 1e-4  # of the clip's width, by which x may lie outside: what rounding in a loader leaves


@dataclass(frozen=True)
class Amount:
    """eps or alpha as the operators take it: one value, or one per sample, (B,), which then takes its place."""

    value: float
    per_sample: Tensor | None = None

    def scaled(self, factor: float) -> Amount:
        return Amount(factor * self.value, None if self.per_sample is None else factor * self.per_sample)


def canonical_norm(norm: float | str) -> str:
    """inf, "inf", "Linf", 2, "2", "L2", 1, "1", "L1", "L1-exact" and the like as "inf", "2", "1" or "1-exact"."""
    if type(norm) in (float, int, str) and norm in _SPELLINGS:
        return _SPELLINGS[norm]
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
    if x.numel() == 0 and math.prod(x.shape[1:]) == 0:
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
    if type(value) is not float and not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value >= 0 or (finite and value == math.inf):
        raise ValueError(f"{name}={value} must be >= 0" + finite * " and finite")
    return float(value)


def amount(name: str, value: float | Tensor, x: Tensor, *, finite: bool, reading: Reading | None = None) -> Amount:
    """A number >= 0, or one per sample, which is moved to x's device and to the precision of the maths."""
    if not isinstance(value, Tensor):
        if type(value) is not float and not isinstance(value, Real):
            raise TypeError(f"{name} must be a number or a tensor of shape (B,), got {type(value).__name__}")
        return Amount(number(name, value, finite=finite))
    if value.dim() == 0:
        value = value.expand(x.shape[0])
    _check_length(name, value, x)
    per_sample = value.detach().to(x.device, compute_dtype(x))
    if reading is not None:
        valid = per_sample >= 0
        if finite:
            valid &= per_sample < math.inf
        message = f"{name} has elements that are not >= 0" + finite * " and finite"
        reading.expect(refusal_unless(message), valid.all())
    return Amount(0.0, per_sample)


def refusal_unless(message: str) -> Callable[[float], None]:
    """For ``Reading.expect``: a ValueError if the value read is 0."""

    def judge(holds: float) -> None:
        if not holds:
            raise ValueError(message)

    return judge


def bounds(clip: Clip, x: Tensor, reading: Reading | None = None) -> tuple[OneBound, OneBound]:
    """clip = (lower, upper) as numbers, or tensors that broadcast to x; None where there is no bound."""
    if clip is None:
        return None, None
    if not isinstance(clip, (tuple, list)) or len(clip) != 2:
        raise ValueError(
            f"clip={clip!r} must be a pair (lower, upper) of numbers, per-channel tensors or None (no bound), or None"
        )
    lower, upper = _bound(clip[0], -math.inf, x), _bound(clip[1], math.inf, x)
    are_numbers = isinstance(lower, float) and isinstance(upper, float)
    if _is_nan(lower) or _is_nan(upper) or (are_numbers and lower > upper):  # type: ignore[operator]
        raise ValueError(f"clip={clip!r}: the lower bound must not be above the upper, and neither may be NaN")
    if reading is not None and (isinstance(lower, Tensor) or isinstance(upper, Tensor)):
        low, high = as_tensor(lower, -math.inf, x), as_tensor(upper, math.inf, x)
        message = "clip: no element of the lower bound may be above the upper, or NaN"
        reading.expect(refusal_unless(message), (low <= high).all())
    return lower, upper


def _is_nan(bound: OneBound) -> bool:
    return isinstance(bound, float) and bound != bound


def _bound(bound: Bound | None, nowhere: float, x: Tensor) -> OneBound:
    if bound is None:
        return None
    if type(bound) not in (float, int) and not isinstance(bound, Real):
        return per_channel("clip", bound, x)
    number = float(bound)  # type: ignore[arg-type]
    if not abs(number) <= _LARGEST:
        number = _in_range(number, compute_dtype(x))
    return None if number == nowhere else number


def as_tensor(bound: OneBound, nowhere: float, x: Tensor) -> Tensor:
    """A bound as a tensor of the precision of the maths, on x's device."""
    if isinstance(bound, Tensor):
        return bound
    # A fill, so that the host need not wait for a copy.
    return x.new_full((), nowhere if bound is None else bound, dtype=compute_dtype(x))


def check_within(x: Tensor, clip: Clip, lower: OneBound, upper: OneBound, reading: Reading) -> None:
    """x lies within its clip, up to rounding: a clipped x_adv would else be far from x, whatever eps is."""
    if (lower is None and upper is None) or x.numel() == 0 or not reading.possible:
        return
    least, greatest = x.detach().aminmax()
    unit = torch.finfo(x.dtype).eps
    shown = f"clip={clip!r}" if all(b is None or isinstance(b, Real) for b in clip or ()) else "the clip"

    def judge(is_outside: float, least: float, greatest: float) -> None:
        if is_outside:
            raise ValueError(
                f"x has values from {least:.4g} to {greatest:.4g}, outside {shown}, which is in the units of x: if x "
                "was normalised, give x as it was before, and the normalisation as mean= and std=; else choose a clip "
                "that holds x"
            )

    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor):

        def judge_numbers(least: float, greatest: float) -> None:
            low, high = -math.inf if lower is None else lower, math.inf if upper is None else upper
            # Where one side is open, x itself shows how wide the range is.
            first, last = low if math.isfinite(low) else least, high if math.isfinite(high) else greatest
            slack = _MARGIN * max(last - first, 0.0) + unit * max(abs(first), abs(last))
            judge(least < low - slack or greatest > high + slack, least, greatest)

        reading.expect(judge_numbers, least, greatest)
        return
    low, high = as_tensor(lower, -math.inf, x), as_tensor(upper, math.inf, x)
    first, last = (
        torch.where(low.isfinite(), low, least.to(low.dtype)),
        torch.where(high.isfinite(), high, greatest.to(high.dtype)),
    )
    slack = _MARGIN * (last - first).clamp(min=0) + unit * torch.maximum(first.abs(), last.abs())
    outside = (x.detach() < low - slack) | (x.detach() > high + slack)
    reading.expect(judge, outside.any(), least, greatest)


def per_channel(name: str, value: Bound, x: Tensor) -> Tensor:
    """A number, one number per channel, or a tensor that broadcasts to x, as a tensor that does."""
    dtype = compute_dtype(x)
    if isinstance(value, Real):
        return x.new_full((), _in_range(float(value), dtype), dtype=dtype)  # a fill: the host need not wait for a copy
    try:
        tensor = _on_device(value, dtype, x)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name}={value!r} must be a number, a sequence of {x.shape[1]} numbers (one per channel), or a tensor"
        ) from error
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


def _on_device(value: Tensor | Sequence[float], dtype: torch.dtype, x: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(x.device, dtype)
    if x.device.type == "cpu" or not (
        isinstance(value, (list, tuple))
        and 0 < len(value) <= _MOST_FILLS
        and all(isinstance(number, Real) for number in value)
    ):
        return torch.as_tensor(value, dtype=dtype, device=x.device).detach()
    # Fills: the host need not wait for a copy, and a captured graph may have none.
    return torch.stack([x.new_full((), float(number), dtype=dtype) for number in value])


def _in_range(number: float, dtype: torch.dtype) -> float:
    return math.copysign(math.inf, number) if abs(number) > torch.finfo(dtype).max else number


def normalisation(
    mean: Bound | None, std: Bound | None, x: Tensor, reading: Reading
) -> tuple[Tensor | None, Tensor | None]:
    """mean and std as tensors of x's dtype that broadcast to x."""
    info = torch.finfo(x.dtype)
    shift = scale = None
    if mean is not None:
        shift = per_channel("mean", mean, x).to(x.dtype)
        what = f"mean={mean!r}" if isinstance(mean, Real) else "mean has elements that are not finite:"
        finite = refusal_unless(f"{what} must be finite in {x.dtype}, the dtype of x")
        if isinstance(mean, Real):
            finite(abs(float(mean)) <= info.max)
        else:
            reading.expect(finite, shift.isfinite().all())
    if std is not None:
        numbers = per_channel("std", std, x)
        scale = numbers.to(x.dtype)
        what = f"std={std!r}" if isinstance(std, Real) else "std has elements that are not valid: they"
        no_zero = refusal_unless("std has a 0; samples cannot be divided by it")
        usable = refusal_unless(
            f"{what} must be > 0 and from {info.tiny:.3g} to {info.max:.3g}, the normal numbers of {x.dtype}, "
            "the dtype of x: samples are divided by it"
        )
        if isinstance(std, Real):
            no_zero(std != 0)
            usable(info.tiny <= float(std) <= info.max)
        else:
            reading.expect(no_zero, (numbers != 0).all())
            reading.expect(usable, ((scale >= info.tiny) & scale.isfinite()).all())
    return shift, scale
