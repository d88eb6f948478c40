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
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Bound = Tensor | float | None
"""One side of the clip: a tensor that broadcasts to x, a number, or none."""

_PART = 262144  # elements of a part: what calls cost is little beside them, and a few tensors of 1 MB stay in the cache
_GRAIN = 32768  # elements below which PyTorch gives a thread nothing to do


class Buffers(threading.local):
    """Memory for intermediate results of a part, which the next part uses again, and so does the next call.

    Each thread keeps one tensor of at most ``_PART`` elements per slot and dtype: the system takes freed memory of this
    size back, and to get it again costs more than the arithmetic.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}  # whole, and the shape last asked for

    def get(self, slot: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of the size of ``like``, with anything in it; slots 0, 1, ... do not overlap."""
        dtype, size = dtype or like.dtype, like.numel()
        if not _GRAIN < size <= _PART or like.device.type != "cpu" or not like.is_contiguous():
            return torch.empty_like(like, dtype=dtype)
        whole, shaped = self._kept.get((slot, dtype), (None, None))
        if shaped is not None and shaped.shape == like.shape:
            return shaped
        if whole is None or len(whole) < size:
            with torch.inference_mode(False):  # a tensor made in inference mode is of no use outside
                whole = torch.empty(size, dtype=dtype, device=like.device)  # whatever the default device is
        shaped = whole[:size].view(like.shape)
        if type(whole) is Tensor:  # and not of a mode that is active now
            self._kept[slot, dtype] = whole, shaped
        return shaped


BUFFERS = Buffers()


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
    grad = cast(grad, out.dtype)
    # A look at the sum, which is finite only if all elements are: reading is cheaper than copying.
    if grad.device.type == "cpu" and math.isfinite(float(grad.sum())):
        return grad
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0, out=out)


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t in this dtype; asking costs less than converting to the same."""
    return t if t.dtype == dtype else t.to(dtype)


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
