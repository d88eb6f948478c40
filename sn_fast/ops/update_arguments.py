"""Arguments of the attacks' updates, as the operators refuse and translate them.

An operator's bound is a tensor (``lower``, ``upper``) or, where there is none, a number (``low``, ``high``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.samples import Bound
from .library import dtype_code

RESIDENT_BYTES = 96 * 1024
"""Shared memory in which the kernels hold one sample: what a thread block gets on every GPU since sm_80."""

_NORM_CODES = {"inf": 0, "2": 1, "1": 2, "1-exact": 3}  # csrc/attacks/pgd_step.h: Norm
_Clip = tuple[Tensor | None, Tensor | None]


def check(x: Tensor, alike: dict[str, Tensor], per_sample: dict[str, Tensor | None], clip: _Clip) -> None:
    """Refuse what the kernels must not meet: they are given addresses."""
    if x.dim() < 1:
        raise ValueError("x has no dimensions, must be (B, *size); use x[None] for one sample")
    shape, device = x.shape, x.device
    for name, t in alike.items():
        if t.shape != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, x has {tuple(shape)}; they must be equal")
        check_device(name, t, device)
    for name, one in per_sample.items():
        if one is not None:
            if one.shape != shape[:1]:
                raise ValueError(f"{name} has shape {tuple(one.shape)}, must be ({shape[0]},): one value per sample")
            check_device(name, one, device)
    for name, bound in zip(("lower", "upper"), clip):
        if bound is not None:
            if not _fits(bound, x):
                raise ValueError(f"{name} of shape {tuple(bound.shape)} does not broadcast to x of {tuple(shape)}")
            check_device(name, bound, device)


def check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, x on {device}; move it with {name}.to(x.device)")


def _fits(bound: Tensor, x: Tensor) -> bool:
    """Whether a bound broadcasts to x."""
    return bound.dim() <= x.dim() and all(n in (1, m) for n, m in zip(bound.shape[::-1], x.shape[::-1]))


def takes(x: Tensor, x_adv: Tensor, grad: Tensor | None = None) -> bool:
    """Whether the kernels take these dtypes."""
    taken = dtype_code(x) is not None and x_adv.dtype == x.dtype
    return taken and (grad is None or dtype_code(grad) is not None)


def norm_code(norm: str) -> int:
    if norm not in _NORM_CODES:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(_NORM_CODES)}")
    return _NORM_CODES[norm]


def one_of(bound: Tensor | None, number: float | None) -> Bound:
    return number if bound is None else bound


def like_first(first: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(first)
