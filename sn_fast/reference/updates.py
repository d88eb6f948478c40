"""The updates of the attacks: one gradient step, one WRM step, and the projections.

Their cost is memory traffic, so every function works in place on its result and on few buffers of its own, and reads
and writes full-size tensors as rarely as plain PyTorch allows. On the CPU it goes through the batch in parts that stay
in the cache, so that only the first reading and the last writing of a tensor meet the memory, and it takes a look at
norms where that saves a pass (elsewhere a look would wait for the device). Passes (full-size reads + writes, clip not
included):

    pgd_step   inf with eps = inf and a full-size box: 11, with a finite eps: 15    2: 18, on the CPU 11    1: 22, 15
    wrm_step   8
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

from .linear_map import compute_dtype

Bound = Tensor | float | None
"""One side of the clip: a tensor that broadcasts to x, a number, or none."""

_ORDER = {"2": 2, "1": 1, "1-exact": 1}
_PART = 32768  # elements of a part for each thread: PyTorch gives a thread no fewer, and a few buffers of it fit in L2
_SAFE = 1e-12, 1e15  # float32 norms whose squares neither over- nor underflow to an effect


def pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    norm: str,
    eps: float,
    alpha: float,
    eps_per_sample: Tensor | None,
    alpha_per_sample: Tensor | None,
    lower: Bound,
    upper: Bound,
    targeted: bool,
    active: Tensor | None,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """Move ``alpha`` along the steepest ascent direction (descent if ``targeted``), project on the ball, then clip.

    A non-finite gradient element counts as 0, and a sample whose gradient is 0 or which is not ``active`` stays where
    it is. Directions: sign(g); g / |g|_2; g / |g|_1; "1-exact": the elements of largest |g|, in equal parts, and with a
    clip the elements of largest |g| that have room in it (``_fill_steepest``).
    """
    dtype = compute_dtype(x_adv, grad)
    result = torch.empty_like(x_adv)
    batch = (x_adv, x, grad, eps_per_sample, alpha_per_sample, active)
    for (out, *parts), clip in _in_parts(result, batch, lower, upper, low, high):
        start, centre, g, radii, lengths, moving = parts
        start, centre = start.to(dtype), centre.to(dtype)
        length, radius = _amount(alpha, lengths, start), _amount(eps, radii, start)
        moved = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
        if norm == "1-exact" and any(bound is not None for bound in clip):
            _finite(g, out=moved)
            _fill_steepest(start, centre, moved.neg_() if targeted else moved, length, radius, *clip, out=moved)
        else:
            _move(start, g, norm, length if not targeted else -length, out=moved)
            _into_ball(moved, centre, norm, radius, out=moved)
        _clip_(moved, *clip)
        if moving is not None:
            torch.where(_per_sample(moving, start), moved, start, out=moved)
        if moved is not out:
            out.copy_(moved)
    return result


def wrm_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    eps: float,
    eps_per_sample: Tensor | None,
    step: float,
    lower: Bound,
    upper: Bound,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """x_adv + step (eps g - (x_adv - x)), then clip; a negative eps descends.

    A non-finite gradient element counts as 0.
    """
    dtype = compute_dtype(x_adv, grad)
    result = torch.empty_like(x_adv)
    for (out, start, centre, g, radii), clip in _in_parts(
        result, (x_adv, x, grad, eps_per_sample), lower, upper, low, high
    ):
        start, centre = start.to(dtype), centre.to(dtype)
        moved = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
        _finite(g, out=moved)
        _axpy_(_amount(eps, radii, start), moved, centre)
        torch.lerp(start, moved, step, out=moved)
        _clip_(moved, *clip)
        if moved is not out:
            out.copy_(moved)
    return result


def project(
    x_adv: Tensor,
    x: Tensor,
    norm: str,
    eps: float,
    eps_per_sample: Tensor | None,
    lower: Bound,
    upper: Bound,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """x_adv brought into the ball of radius eps around x, then clipped. A sample inside keeps its bits.

    The nearest point for "inf", "2" and "1-exact"; "1" scales x_adv - x down, which is not the nearest point.
    """
    dtype = compute_dtype(x_adv)
    result = torch.empty_like(x_adv)
    for (out, start, centre, radii), clip in _in_parts(result, (x_adv, x, eps_per_sample), lower, upper, low, high):
        start, centre = start.to(dtype), centre.to(dtype)
        moved = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
        _into_ball(start, centre, norm, _amount(eps, radii, start), out=moved)
        _clip_(moved, *clip)
        if moved is not out:
            out.copy_(moved)
    return result


def box(x: Tensor, eps: float, eps_per_sample: Tensor | None, lower: Bound, upper: Bound) -> tuple[Tensor, Tensor]:
    """The l_inf ball and the clip as one box: clamping to it is clamping to the ball, then to the clip."""
    centre = x.to(compute_dtype(x))
    radius = _amount(eps, eps_per_sample, centre)
    low, high = centre - radius, centre + radius
    _clip_(low, lower, upper)
    _clip_(high, lower, upper)
    return low, high


def _in_parts(
    out: Tensor, batch: tuple[Tensor | None, ...], lower: Bound, upper: Bound, low: float | None, high: float | None
) -> Iterator[tuple[list[Any], tuple[Bound, Bound]]]:
    """``out``, ``batch`` and the clip of the whole batch, or on the CPU of few samples at a time."""
    lower, upper = low if lower is None else lower, high if upper is None else upper
    samples = len(out)
    size = max(1, _PART * torch.get_num_threads() * samples // max(out.numel(), 1))  # samples of a part
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


def _finite(grad: Tensor, out: Tensor) -> None:
    """out := grad with 0 in place of NaN and inf."""
    torch.nan_to_num(grad.to(out.dtype), nan=0.0, posinf=0.0, neginf=0.0, out=out)


def _move(start: Tensor, grad: Tensor, norm: str, length: float | Tensor, out: Tensor) -> None:
    """out := start + length * direction."""
    if norm in ("2", "1") and grad.dtype == out.dtype and grad.device.type == "cpu" and grad.numel() > 0:
        # A look at the norms: where they are ordinary, no element is NaN or inf, and nothing has to be rescaled.
        norms = _norm(grad, norm, out)
        smallest, largest = (float(n) for n in norms.aminmax())
        if smallest > _SAFE[0] and largest < _SAFE[1]:
            torch.addcmul(start, grad, length / norms, out=out)
            return
    _finite(grad, out)
    if norm == "inf":
        out.sign_()
    else:
        length = length / _rescale_(out, norm)
    _axpy_(length, out, start)


def _rescale_(g: Tensor, norm: str) -> Tensor:
    """Scale each sample of ``g`` so that no norm under- or overflows, and return its norm.

    By a power of two, which changes no bit of the step; no additive epsilon is needed: a zero gradient stays zero, with
    norm 1. For "1-exact" only the largest elements are kept, as ±1.
    """
    largest = _one_if_zero(g.abs().amax(dim=_inner(g), keepdim=True))
    if norm == "1-exact":
        g.div_(largest).trunc_()  # a correctly rounded division gives 1 for the largest elements alone
    else:
        limit = -math.log2(torch.finfo(g.dtype).tiny)  # 2 to this power, up or down, is a number
        g.mul_(largest.log2().floor().clamp(-limit, limit).neg().exp2())
    return _one_if_zero(_norm(g, norm))


def _axpy_(a: float | Tensor, direction: Tensor, start: Tensor) -> None:
    """direction := start + a * direction."""
    if isinstance(a, Tensor):
        torch.addcmul(start, direction, a, out=direction)
    else:
        torch.add(start, direction, alpha=a, out=direction)


def _into_ball(z: Tensor, x: Tensor, norm: str, eps: float | Tensor, out: Tensor) -> None:
    """out := z projected; ``out`` may be z. Written so that a sample inside keeps its bits: never x + (z - x)."""
    if isinstance(eps, float) and eps == math.inf:
        if out is not z:
            out.copy_(z)
    elif norm == "inf":
        torch.clamp(z, x - eps, x + eps, out=out)
    elif norm == "1-exact":
        delta = z - x
        threshold = _l1_threshold(delta, eps)
        shrunk = delta.sub_(delta.clamp(-threshold, threshold))
        torch.where(threshold > 0, shrunk.add_(x), z, out=out)
    else:
        # Not rescaled as a gradient is: in float32, squares of distances within [1e-18, 1e18] are safe.
        delta = z - x
        distance = _norm(delta, norm, delta)
        # lerp returns its second end exactly for weight 1 and its first for weight 0.
        torch.lerp(x, z, torch.where(distance > eps, eps / distance, 1.0), out=out)


def _l1_threshold(delta: Tensor, eps: float | Tensor) -> Tensor:
    """By how much |delta| must shrink, stopping at 0, to have l1 norm eps; (B, 1, ..., 1), negative inside the ball.

    Duchi, Shalev-Shwartz, Singer, Chandra 2008, Fig. 1. With |delta| sorted downwards and S_j the sum of its first j
    elements the threshold is the largest of (S_j - eps) / j: these rise up to the published rho, and fall after it.
    """
    sums = delta.abs().flatten(1).sort(dim=1, descending=True).values.cumsum(dim=1)
    counts = torch.arange(1, sums.shape[1] + 1, dtype=sums.dtype, device=sums.device)
    radius = eps.flatten(1) if isinstance(eps, Tensor) else eps
    return _per_sample(((sums - radius) / counts).amax(dim=1), delta)


def _fill_steepest(
    z: Tensor,
    x: Tensor,
    g: Tensor,
    alpha: float | Tensor,
    eps: float | Tensor,
    lower: Bound,
    upper: Bound,
    out: Tensor,
) -> None:
    """out := z after an l1 step of length alpha up the gradient within the clip, brought into the l1 ball around x.

    The elements of largest |g| go to their bound, one after the other, until alpha is spent: of all steps of that
    length within the clip none gains more on a linear loss. The ball then takes from the other elements alone (the
    nearest point, Duchi et al. 2008); where the full ones exceed eps by themselves, they are filled from x until eps is
    spent, and the others are back at x. So the iterates of a linear loss stop at its maximum over ball and clip. Where
    no bound is in reach nothing is full, and the step is that without a clip.
    """
    low, high = _numbers(lower, -math.inf, z), _numbers(upper, math.inf, z)
    known = ~(z.isnan() | x.isnan())
    size, sign = torch.where(known, g.abs(), 0.0), g.sign()
    bound = torch.where(g > 0, high, low)
    full, moved = _filled(size, sign, z, bound, alpha)
    if isinstance(eps, Tensor) or eps < math.inf:
        held = torch.where(full, (bound - x).abs(), 0.0)
        exceeds = _total(held) > eps
        # 1) The full elements fit into the ball: the others share what they leave of it.
        delta = torch.where(full, 0.0, moved - x)
        threshold = _l1_threshold(delta, (eps - _total(held)).clamp(min=0))
        shrunk = (delta - delta.clamp(-threshold, threshold)).add_(x)
        inside = torch.where((threshold > 0) & ~full, shrunk, moved)
        # 2) They do not.
        _, refilled = _filled(torch.where(full, size, 0.0), sign, x, bound, eps)
        moved = torch.where(exceeds, refilled, inside)
    out.copy_(moved)


def _filled(size: Tensor, sign: Tensor, start: Tensor, bound: Tensor, budget: float | Tensor) -> tuple[Tensor, Tensor]:
    """Which elements reach ``bound``, and start with the elements of largest ``size`` moved, until budget is spent.

    Elements of equal size share what is left for them in proportion to their room.
    """
    room = torch.where(size > 0, (bound - start) * sign, 0.0).nan_to_num_(nan=0.0, posinf=math.inf).clamp_(min=0)
    room = torch.minimum(room, budget) if isinstance(budget, Tensor) else room.clamp_(max=budget)
    # 1) From the steepest downwards, the first element at which the budget is spent; its size ends the filling.
    sizes, order = size.flatten(1).sort(dim=1, descending=True)
    spent = room.flatten(1).gather(1, order).cumsum(dim=1)
    limit = budget.flatten(1) if isinstance(budget, Tensor) else budget
    last = (spent < limit).sum(dim=1, keepdim=True)
    cut = torch.where(last < sizes.shape[1], sizes.gather(1, last.clamp(max=sizes.shape[1] - 1)), 0.0)
    cut = _per_sample(cut, size)
    # 2) What is above it is full; what is equal takes its part.
    full = size > cut
    sharing = (size == cut) & (room > 0)
    left = budget - _total(torch.where(full, room, 0.0))
    part = (left / _one_if_zero(_total(torch.where(sharing, room, 0.0)))).clamp(0, 1)
    step = torch.where(sharing, sign * part * room, 0.0)
    return full, torch.where(full, bound, torch.where(step != 0, start + step, start))


def _inner(t: Tensor) -> tuple[int, ...]:
    """The dimensions of a sample. Not flattened: a view may not exist (channels_last)."""
    return tuple(range(1, t.dim()))


def _total(t: Tensor) -> Tensor:
    """Sum of each sample, (B, 1, ..., 1)."""
    return t.sum(dim=_inner(t), keepdim=True)


def _numbers(bound: Bound, nowhere: float, z: Tensor) -> Tensor:
    """A bound as a tensor."""
    if isinstance(bound, Tensor):
        return bound.to(z.dtype)
    return z.new_full((), nowhere if bound is None else bound)  # a fill: a captured graph has no copy from the host


def _clip_(z: Tensor, lower: Bound, upper: Bound) -> None:
    # Numbers as such: PyTorch takes them in vector instructions, and tensors of one element it does not.
    alike = isinstance(lower, Tensor) == isinstance(upper, Tensor)
    for bounds in [(lower, upper)] if alike else [(lower, None), (None, upper)]:
        low, high = (b.to(z.dtype) if isinstance(b, Tensor) else b for b in bounds)
        if low is not None or high is not None:
            torch.clamp(z, low, high, out=z)  # type: ignore[arg-type]


def _norm(z: Tensor, norm: str, buffer: Tensor | None = None) -> Tensor:
    """Norm of each sample, (B, 1, ..., 1). ``buffer`` may be overwritten."""
    if norm == "2":
        return torch.linalg.vector_norm(z, 2, dim=_inner(z), keepdim=True)
    return _total(
        z.abs() if buffer is None else torch.abs(z, out=buffer)
    )  # several times faster than vector_norm on the CPU


def _one_if_zero(t: Tensor) -> Tensor:
    return torch.where(t == 0, 1.0, t)


def _amount(value: float, per_sample: Tensor | None, like: Tensor) -> float | Tensor:
    return value if per_sample is None else _per_sample(per_sample.to(like.dtype), like)


def _per_sample(t: Tensor, like: Tensor) -> Tensor:
    return t.reshape(-1, *[1] * (like.dim() - 1))
