"""Samples of a batch, as the attacks' updates in plain PyTorch go through them.

Their cost is memory traffic, so every update works in place on its result and on few buffers of its own, and reads and
writes full-size tensors as rarely as plain PyTorch allows. On the CPU it goes through the batch in parts that stay in
the cache, with the same buffers for all parts: only the first reading and the last writing of a tensor meet the memory.
There it also takes a look at sums and norms where that saves a pass (elsewhere a look would wait for the device).
Passes (full-size reads + writes, clip not included):

    pgd_step   inf with eps = inf and a full-size box: 11, on the CPU 10; with a finite eps: 15, 14
               2: 18, on the CPU 11, or 8 where all samples end inside the ball    1: 22, 15, or 12
    wrm_step   8, on the CPU 7
    project    inf: 8                                                               2: 7                    1: 9

Shapes, common to all: x_adv, x, grad (B, *size), equal; ``eps_per_sample``, ``alpha_per_sample``, ``active`` (B,), the
first two taking the place of ``eps`` and ``alpha`` where given; ``lower`` and ``upper`` broadcast to x, or are numbers,
which ``low`` and ``high`` are where these are None: an operator's schema has no union. ``norm`` is "inf", "2", "1"
(radial, as in the paper) or "1-exact". The maths is in float32 at least, rounded once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Bound = Tensor | float | None
"""One side of the clip: a tensor that broadcasts to x, a number, or none."""

_PART = 262144  # elements of a part: what calls cost is little beside them, and a few tensors of 1 MB stay in the cache
_GRAIN = 32768  # elements below which PyTorch gives a thread nothing to do


class Buffers:
    """Memory for intermediate results, by name: made for the first part of a batch, and used again by the others."""

    def __init__(self) -> None:
        self._made: dict[str, Tensor] = {}

    def get(self, name: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor laid out as ``like``, with anything in it. The first part is the largest."""
        made = self._made.get(name)
        if made is None:
            made = self._made[name] = torch.empty_like(like, dtype=dtype)
        return made if len(made) == len(like) else made[: len(like)]


def in_parts(
    out: Tensor, batch: tuple[Tensor | None, ...], lower: Bound, upper: Bound, low: float | None, high: float | None
) -> Iterator[tuple[list[Any], tuple[Bound, Bound]]]:
    """``out``, ``batch`` and the clip of the whole batch, or on the CPU of few samples at a time."""
    lower, upper = low if lower is None else lower, high if upper is None else upper
    samples = len(out)
    part = max(_PART, _GRAIN * torch.get_num_threads())
    size = max(1, part * samples // max(out.numel(), 1))  # samples of a part
    # Samples that lie interleaved are no parts of the memory.
    if out.device.type != "cpu" or size >= samples or out.stride(0) < max(out.stride()):
        yield [out, *batch], (lower, upper)
        return
    for i in range(0, samples, size):
        parts = [None if t is None else t[i : i + size] for t in (out, *batch)]
        yield parts, (_part(lower, out, i, size), _part(upper, out, i, size))


def _part(bound: Bound, out: Tensor, first: int, size: int) -> Bound:
    """A bound of the samples from ``first`` on."""
    if isinstance(bound, Tensor) and bound.dim() == out.dim() and len(bound) == len(out):
        return bound[first : first + size]
    return bound


def finite(grad: Tensor, out: Tensor) -> Tensor:
    """grad with 0 in place of NaN and inf: in ``out``, or grad itself where there is nothing to replace."""
    grad = grad.to(out.dtype)
    # A look at the sum, which is finite only if all elements are: reading is cheaper than copying.
    if grad.device.type == "cpu" and math.isfinite(float(grad.sum())):
        return grad
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0, out=out)


def axpy(a: float | Tensor, direction: Tensor, start: Tensor, out: Tensor) -> None:
    """out := start + a * direction."""
    if isinstance(a, Tensor):
        torch.addcmul(start, direction, a, out=out)
    else:
        torch.add(start, direction, alpha=a, out=out)


def clip_(z: Tensor, lower: Bound, upper: Bound) -> None:
    """z := z within its bounds."""
    # Numbers as such: PyTorch takes them in vector instructions, and tensors of one element it does not.
    alike = isinstance(lower, Tensor) == isinstance(upper, Tensor)
    for bounds in [(lower, upper)] if alike else [(lower, None), (None, upper)]:
        low, high = (b.to(z.dtype) if isinstance(b, Tensor) else b for b in bounds)
        if low is not None or high is not None:
            torch.clamp(z, low, high, out=z)  # type: ignore[arg-type]


def norm_of(z: Tensor, norm: str, buffer: Tensor | None = None) -> Tensor:
    """Norm of each sample, (B, 1, ..., 1). ``buffer`` may be overwritten."""
    if norm == "2":
        return torch.linalg.vector_norm(z, 2, dim=inner(z), keepdim=True)
    return total(
        z.abs() if buffer is None else torch.abs(z, out=buffer)
    )  # several times faster than vector_norm on the CPU


def total(t: Tensor) -> Tensor:
    """Sum of each sample, (B, 1, ..., 1)."""
    return t.sum(dim=inner(t), keepdim=True)


def inner(t: Tensor) -> tuple[int, ...]:
    """The dimensions of a sample. Not flattened: a view may not exist (channels_last)."""
    return tuple(range(1, t.dim()))


def one_if_zero(t: Tensor) -> Tensor:
    """1 in place of 0, to divide by."""
    return torch.where(t == 0, 1.0, t)


def numbers(bound: Bound, nowhere: float, z: Tensor) -> Tensor:
    """A bound as a tensor."""
    if isinstance(bound, Tensor):
        return bound.to(z.dtype)
    return z.new_full((), nowhere if bound is None else bound)  # a fill: a captured graph has no copy from the host


def amount_of(value: float, per_sample: Tensor | None, like: Tensor) -> float | Tensor:
    """One number, or one per sample as a tensor that broadcasts to ``like``."""
    return value if per_sample is None else spread(per_sample.to(like.dtype), like)


def spread(t: Tensor, like: Tensor) -> Tensor:
    """One value per sample, (B,), as (B, 1, ..., 1)."""
    return t.reshape(-1, *[1] * (like.dim() - 1))
