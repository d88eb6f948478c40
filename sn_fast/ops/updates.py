"""Operators of the attacks' updates. Arguments are as in ``reference.updates``; ``attacks.steps`` checks them.

The kernels take float32, float16 and bfloat16 (the gradient's may differ); the reference does the rest. They walk
through x_adv in the order of its memory. What that order does not fit is copied first, which costs two passes each:
an x or grad whose samples are laid out otherwise than those of x_adv, an x_adv whose samples are not dense, and a
bound that varies along other dimensions than one run of them (per-channel values and full-size boxes are no copies).
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..reference import random_start as _random_start_reference
from ..reference import updates as _reference
from .library import define, dtype_code, stream_of

RESIDENT_BYTES = 96 * 1024
"""Shared memory in which the kernels hold one sample: what a thread block gets on every GPU since sm_80."""

_NORM_CODES = {"inf": 0, "2": 1, "1": 2, "1-exact": 3}  # csrc/attacks/pgd_step.h: Norm
_MAX_DIGITS = 8  # csrc/attacks/random_start.h: LogicalIndex
_MAX_INDEX = 2**31  # of an element in its sample, where the kernels divide by sizes
_MAX_TIES = 2**32  # elements of equal |g| that the kernels can count

_Clip = tuple[Tensor | None, Tensor | None]


class _Layout:
    """How the tensors of one update lie in memory: as ``out``, whose samples are dense and one after the other.

    Its methods describe a tensor to the compiled module (csrc/attacks/samples.h), and keep alive what they copied.
    """

    def __init__(self, x_adv: Tensor) -> None:
        self.batch, self.numel = x_adv.shape[0], math.prod(x_adv.shape[1:])
        self.result = self.out = torch.empty_like(x_adv)
        if not (self.out.is_contiguous() or self._is_dense()):
            self.out = torch.empty_like(x_adv, memory_format=torch.contiguous_format)
        self._strides = self.out.stride()
        self._copies: list[Tensor] = []

    @property
    def dims(self) -> list[int]:
        """Dimensions of a sample from the fastest to the slowest; those of size 1 have no place in memory."""
        shape, strides = self.out.shape, self.out.stride()
        return sorted((d for d in range(len(shape) - 1, 0, -1) if shape[d] != 1), key=lambda d: strides[d])

    def _is_dense(self) -> bool:
        expected, strides = 1, self.out.stride()
        for d in self.dims:
            if strides[d] != expected:
                return False
            expected *= self.out.shape[d]
        return self.batch <= 1 or strides[0] == self.numel

    @property
    def sizes(self) -> tuple[int, int]:
        return self.batch, self.numel

    def elements(self, t: Tensor | None) -> tuple[int, int, int]:
        """A tensor of the batch's shape: address, dtype code, batch stride."""
        if t is None:
            return 0, 0, 0
        if not self._matches(t):
            t = self._kept(torch.empty_like(self.out, dtype=t.dtype).copy_(t))
        code = dtype_code(t)
        assert code is not None
        return t.data_ptr(), code, self.numel if self.batch == 1 else t.stride(0)

    def amount(self, value: float, per_sample: Tensor | None = None) -> tuple[float, int]:
        """eps or alpha."""
        return value, 0 if per_sample is None else self._kept(per_sample.to(torch.float32).contiguous()).data_ptr()

    def flags(self, active: Tensor | None) -> int:
        return 0 if active is None else self._kept(active.contiguous()).data_ptr()

    def bound(self, t: Tensor | None) -> tuple[int, int, tuple[int, int, int, int]]:
        """``lower`` or ``upper``: kind, address, (batch stride, inner, count, stride)."""
        if t is None:
            return 0, 0, (0, 1, 1, 0)
        t = self._kept(t.to(torch.float32))
        if t.numel() == 1:
            return 1, t.data_ptr(), (0, 1, 1, 0)
        t, dims = t.expand(self.out.shape), self.dims
        run = [d for d in dims if t.stride(d) != 0]
        batch_stride = self.numel if self.batch == 1 else t.stride(0)
        if not run:
            return 1, t.data_ptr(), (batch_stride, 1, 1, 0)
        if not self._matches(t):
            first, last = dims.index(run[0]), dims.index(run[-1])
            is_run = last - first == len(run) - 1
            is_even = all(t.stride(b) == t.stride(a) * t.shape[a] for a, b in pairwise(run))
            if is_run and is_even and self.numel < _MAX_INDEX:
                inner, count = (math.prod(t.shape[d] for d in part) for part in (dims[:first], run))
                return 2, t.data_ptr(), (batch_stride, inner, count, t.stride(run[0]))
            t = self._kept(torch.empty_like(self.out, dtype=torch.float32).copy_(t))
            batch_stride = self.numel
        return 3, t.data_ptr(), (batch_stride, 1, 1, 0)

    def digits(self) -> list[tuple[int, int]]:
        """From an element's place in memory to its logical index: sizes and strides, fastest first; [] if equal."""
        digits: list[tuple[int, int]] = []
        for d in self.dims:
            size, stride = self.out.shape[d], math.prod(self.out.shape[d + 1 :])
            if digits and stride == digits[-1][0] * digits[-1][1]:
                digits[-1] = (digits[-1][0] * size, digits[-1][1])
            else:
                digits.append((size, stride))
        return digits if len(digits) > 1 else []

    def finish(self) -> Tensor:
        return self.result if self.out is self.result else self.result.copy_(self.out)

    def _matches(self, t: Tensor) -> bool:
        """Whether samples of t lie as those of ``out``."""
        strides = t.stride()
        return strides == self._strides or all(strides[d] == self._strides[d] for d in self.dims)

    def _kept(self, t: Tensor) -> Tensor:
        self._copies.append(t)
        return t


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
    codes = [dtype_code(t) for t in (x, x_adv, grad) if t is not None]
    return None not in codes and codes[0] == codes[1]


def _norm_code(norm: str) -> int:
    if norm not in _NORM_CODES:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(_NORM_CODES)}")
    return _NORM_CODES[norm]


def _pgd_step_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor | None,
    norm: str,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    targeted: bool,
    active: Tensor | None,
) -> Tensor:
    alike = {"x_adv": x_adv} if grad is None else {"x_adv": x_adv, "grad": grad}
    per_sample = {"eps_per_sample": eps_per_sample, "alpha_per_sample": alpha_per_sample, "active": active}
    _check(x, alike, per_sample, (lower, upper))
    if active is not None and active.dtype != torch.bool:
        raise TypeError(f"active must be a bool tensor, got {active.dtype}; convert it with active.bool()")
    code = _norm_code(norm)
    layout = _Layout(x_adv)
    if not _takes(x, x_adv, grad) or (norm == "1-exact" and layout.numel >= _MAX_TIES):
        if grad is None:
            return _reference.project(x_adv, x, norm, eps, eps_per_sample, lower, upper)
        amounts = (eps, alpha, eps_per_sample, alpha_per_sample)
        return _reference.pgd_step(x_adv, x, grad, norm, *amounts, lower, upper, targeted, active)
    if x_adv.numel() == 0:
        return layout.result
    ball = eps_per_sample is not None or eps < math.inf
    read = [x_adv, *([x] if ball else []), *([] if grad is None else [grad])]
    sums = module.pgd_step_partials(layout.sizes, [dtype_code(t) for t in read], code, RESIDENT_BYTES)
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
        partials.data_ptr() if sums else 0,
        RESIDENT_BYTES,
        stream_of(x.device),
    )
    return layout.finish()


def _project_kernel(
    module: ModuleType,
    x_adv: Tensor,
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
) -> Tensor:
    """A step without a gradient."""
    return _pgd_step_kernel(
        module, x_adv, x, None, norm, eps, 0.0, eps_per_sample, None, lower, upper, targeted=False, active=None
    )


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
) -> Tensor:
    _check(x, {"x_adv": x_adv, "grad": grad}, {"eps_per_sample": eps_per_sample}, (lower, upper))
    if not _takes(x, x_adv, grad):
        return _reference.wrm_step(x_adv, x, grad, eps, eps_per_sample, step, lower, upper)
    layout = _Layout(x_adv)
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


def _random_start_kernel(
    module: ModuleType,
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    seed: Tensor,
) -> Tensor:
    _check(x, {}, {"eps_per_sample": eps_per_sample}, (lower, upper))
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(f"seed must be one int64 on {x.device}, got {seed.numel()} {seed.dtype} on {seed.device}")
    code = _norm_code(norm)
    layout = _Layout(x)
    digits = layout.digits()
    if not _takes(x, x) or len(digits) > _MAX_DIGITS or (digits and layout.numel >= _MAX_INDEX):
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
        stream_of(x.device),
    )
    return layout.finish()


def _like_first(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first)


pgd_step = define(
    "pgd_step(Tensor x_adv, Tensor x, Tensor grad, str norm, float eps, float alpha, Tensor? eps_per_sample,"
    " Tensor? alpha_per_sample, Tensor? lower, Tensor? upper, bool targeted, Tensor? active) -> Tensor",
    _reference.pgd_step,
    _like_first,
    _pgd_step_kernel,
)

wrm_step = define(
    "wrm_step(Tensor x_adv, Tensor x, Tensor grad, float eps, Tensor? eps_per_sample, float step, Tensor? lower,"
    " Tensor? upper) -> Tensor",
    _reference.wrm_step,
    _like_first,
    _wrm_step_kernel,
)

project = define(
    "project(Tensor x_adv, Tensor x, str norm, float eps, Tensor? eps_per_sample, Tensor? lower, Tensor? upper)"
    " -> Tensor",
    _reference.project,
    _like_first,
    _project_kernel,
)

random_start = define(
    "random_start(Tensor x, str norm, float eps, Tensor? eps_per_sample, Tensor? lower, Tensor? upper, Tensor seed)"
    " -> Tensor",
    _random_start_reference.random_start,
    _like_first,
    _random_start_kernel,
)
