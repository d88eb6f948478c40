"""Operators of the attacks' updates. Arguments are as in ``reference.updates``; ``attacks.steps`` checks them.

The kernels take float32, float16 and bfloat16 (the gradient's may differ); the reference does the rest. They walk
through x_adv in the order of its memory. What that order does not fit is copied first, which costs two passes each:
an x or grad whose samples are laid out otherwise than those of x_adv, an x_adv whose samples are not dense, and a
bound that varies along other dimensions than one run of them (per-channel values and full-size boxes are no copies).
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import random_start as _random_start_reference
from ..reference import updates as _reference
from ..reference.updates import Bound
from .library import define, dtype_code, stream_of
from .update_layout import MAX_INDEX, Layout

RESIDENT_BYTES = 96 * 1024
"""Shared memory in which the kernels hold one sample: what a thread block gets on every GPU since sm_80."""

_NORM_CODES = {"inf": 0, "2": 1, "1": 2, "1-exact": 3}  # csrc/attacks/pgd_step.h: Norm
_LEAST_SHARED = 8192  # bytes, more than the kernels need beside a sample
_MAX_DIGITS = 8  # csrc/attacks/random_start.h: LogicalIndex
_MAX_TIES = 2**32  # elements of equal |g| that the kernels can count

_Clip = tuple[Tensor | None, Tensor | None]


def _check(x: Tensor, alike: dict[str, Tensor], per_sample: dict[str, Tensor | None], clip: _Clip) -> None:
    """Refuse what the kernels must not meet: they are given addresses."""
    if x.dim() < 1:
        raise ValueError("x has no dimensions, must be (B, *size); use x[None] for one sample")
    shape, device = x.shape, x.device
    for name, t in alike.items():
        if t.shape != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, x has {tuple(shape)}; they must be equal")
        _check_device(name, t, device)
    for name, one in per_sample.items():
        if one is not None:
            if one.shape != shape[:1]:
                raise ValueError(f"{name} has shape {tuple(one.shape)}, must be ({shape[0]},): one value per sample")
            _check_device(name, one, device)
    for name, bound in zip(("lower", "upper"), clip):
        if bound is not None:
            if not _fits(bound, x):
                raise ValueError(f"{name} of shape {tuple(bound.shape)} does not broadcast to x of {tuple(shape)}")
            _check_device(name, bound, device)


def _check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, x on {device}; move it with {name}.to(x.device)")


def _fits(bound: Tensor, x: Tensor) -> bool:
    """Whether a bound broadcasts to x."""
    return bound.dim() <= x.dim() and all(n in (1, m) for n, m in zip(bound.shape[::-1], x.shape[::-1]))


def _takes(x: Tensor, x_adv: Tensor, grad: Tensor | None = None) -> bool:
    """Whether the kernels take these dtypes."""
    taken = dtype_code(x) is not None and x_adv.dtype == x.dtype
    return taken and (grad is None or dtype_code(grad) is not None)


def _norm_code(norm: str) -> int:
    if norm not in _NORM_CODES:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(_NORM_CODES)}")
    return _NORM_CODES[norm]


def pgd_step_by_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor | None,
    norm: str,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    lower: Bound,
    upper: Bound,
    targeted: bool,
    active: Tensor | None,
) -> Tensor:
    """``pgd_step`` of checked arguments; without a gradient ``project``."""
    code = _norm_code(norm)
    layout = Layout(x_adv)
    if not _takes(x, x_adv, grad) or (norm == "1-exact" and layout.numel >= _MAX_TIES):
        with torch.no_grad():
            if grad is None:
                return _reference.project(x_adv, x, norm, eps, eps_per_sample, lower, upper)
            amounts = (eps, alpha, eps_per_sample, alpha_per_sample)
            return _reference.pgd_step(x_adv, x, grad, norm, *amounts, lower, upper, targeted, active)
    if x_adv.numel() == 0:
        return layout.result
    ball = eps_per_sample is not None or eps < math.inf
    sums, partials = 0, None
    if norm in ("2", "1") and 12 * layout.numel + _LEAST_SHARED > RESIDENT_BYTES:  # smaller samples fit in any dtype
        read = [x_adv, *([x] if ball else []), *([] if grad is None else [grad])]
        sums = module.pgd_step_partials(layout.sizes, [dtype_code(t) for t in read], code, RESIDENT_BYTES)
    if sums:
        partials = x_adv.new_empty(sums, dtype=torch.float64)
    module.pgd_step(
        layout.sizes,
        layout.elements(layout.out),
        layout.elements(x_adv),
        layout.elements(x if ball else None),
        layout.elements(grad),
        code,
        layout.amount(eps, eps_per_sample),
        layout.amount(alpha, alpha_per_sample),
        layout.bound(lower),
        layout.bound(upper),
        layout.flags(active),
        targeted,
        ball,
        0 if partials is None else partials.data_ptr(),
        RESIDENT_BYTES,
        stream_of(x.device),
    )
    return layout.finish()


def project_by_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Bound,
    upper: Bound,
) -> Tensor:
    """``project`` of checked arguments: a step without a gradient."""
    return pgd_step_by_kernel(
        module, x_adv, x, None, norm, eps, 0.0, eps_per_sample, None, lower, upper, targeted=False, active=None
    )


def wrm_step_by_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    step: float,
    lower: Bound,
    upper: Bound,
) -> Tensor:
    """``wrm_step`` of checked arguments."""
    if not _takes(x, x_adv, grad):
        with torch.no_grad():
            return _reference.wrm_step(x_adv, x, grad, eps, eps_per_sample, step, lower, upper)
    layout = Layout(x_adv)
    if x_adv.numel() == 0:
        return layout.result
    module.wrm_step(
        layout.sizes,
        layout.elements(layout.out),
        layout.elements(x_adv),
        layout.elements(x),
        layout.elements(grad),
        layout.amount(eps, eps_per_sample),
        step,
        layout.bound(lower),
        layout.bound(upper),
        stream_of(x.device),
    )
    return layout.finish()


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
    code = _norm_code(norm)
    layout = Layout(x)
    digits = layout.digits()
    if not _takes(x, x) or len(digits) > _MAX_DIGITS or (digits and layout.numel >= MAX_INDEX):
        return _random_start_reference.random_start(x, norm, eps, eps_per_sample, lower, upper, seed)
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


# -- the operators: a bound is a tensor (lower, upper) or, where there is none, a number (low, high) ------------------


def _one(bound: Tensor | None, number: float | None) -> Bound:
    return number if bound is None else bound


def _pgd_step_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    norm: str,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    targeted: bool,
    active: Tensor | None,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    per_sample = {"eps_per_sample": eps_per_sample, "alpha_per_sample": alpha_per_sample, "active": active}
    _check(x, {"x_adv": x_adv, "grad": grad}, per_sample, (lower, upper))
    if active is not None and active.dtype != torch.bool:
        raise TypeError(f"active must be a bool tensor, got {active.dtype}; convert it with active.bool()")
    amounts = (eps, alpha, eps_per_sample, alpha_per_sample)
    clip = (_one(lower, low), _one(upper, high))
    return pgd_step_by_kernel(module, x_adv, x, grad, norm, *amounts, *clip, targeted, active)


def _project_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    _check(x, {"x_adv": x_adv}, {"eps_per_sample": eps_per_sample}, (lower, upper))
    return project_by_kernel(module, x_adv, x, norm, eps, eps_per_sample, _one(lower, low), _one(upper, high))


def _wrm_step_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    step: float,
    lower: Tensor | None,
    upper: Tensor | None,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    _check(x, {"x_adv": x_adv, "grad": grad}, {"eps_per_sample": eps_per_sample}, (lower, upper))
    clip = (_one(lower, low), _one(upper, high))
    return wrm_step_by_kernel(module, x_adv, x, grad, eps, eps_per_sample, step, *clip)


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
    _check(x, {}, {"eps_per_sample": eps_per_sample}, (lower, upper))
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(f"seed must be one int64 on {x.device}, got {seed.numel()} {seed.dtype} on {seed.device}")
    clip = (_one(lower, low), _one(upper, high))
    return random_start_by_kernel(module, x, norm, eps, eps_per_sample, *clip, seed)


def _like_first(first: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(first)


pgd_step = define(
    "pgd_step(Tensor x_adv, Tensor x, Tensor grad, str norm, float eps, float alpha, Tensor? eps_per_sample,"
    " Tensor? alpha_per_sample, Tensor? lower, Tensor? upper, bool targeted, Tensor? active, float? low=None,"
    " float? high=None) -> Tensor",
    _reference.pgd_step,
    _like_first,
    _pgd_step_kernel,
)

wrm_step = define(
    "wrm_step(Tensor x_adv, Tensor x, Tensor grad, float eps, Tensor? eps_per_sample, float step, Tensor? lower,"
    " Tensor? upper, float? low=None, float? high=None) -> Tensor",
    _reference.wrm_step,
    _like_first,
    _wrm_step_kernel,
)

project = define(
    "project(Tensor x_adv, Tensor x, str norm, float eps, Tensor? eps_per_sample, Tensor? lower, Tensor? upper,"
    " float? low=None, float? high=None) -> Tensor",
    _reference.project,
    _like_first,
    _project_kernel,
)

random_start = define(
    "random_start(Tensor x, str norm, float eps, Tensor? eps_per_sample, Tensor? lower, Tensor? upper, Tensor seed,"
    " float? low=None, float? high=None) -> Tensor",
    _random_start_reference.random_start,
    _like_first,
    _random_start_kernel,
)
