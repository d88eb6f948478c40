"""One gradient step and the projections; see ``samples`` for what the updates have in common."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .l1_fill import fill_steepest, l1_threshold
from .linear_map import compute_dtype
from .samples import BUFFERS, Bound, amount_of, axpy, cast, clip_, finite, in_parts, inner, norm_of, one_if_zero, spread

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
    clip the elements of largest |g| that have room in it (``fill_steepest``).
    """
    dtype = compute_dtype(x_adv, grad)
    result = torch.empty_like(x_adv)
    batch = (x_adv, x, grad, eps_per_sample, alpha_per_sample, active)
    for (out, *parts), clip in in_parts(result, batch, lower, upper, low, high):
        start, centre, g, radii, lengths, moving = parts
        start, centre = cast(start, dtype), cast(centre, dtype)
        length, radius = amount_of(alpha, lengths, start), amount_of(eps, radii, start)
        moved = out if out.dtype == dtype else BUFFERS.get(2, out, dtype)
        if norm == "1-exact" and any(bound is not None for bound in clip):
            ascent = finite(g, out=moved)
            fill_steepest(start, centre, -ascent if targeted else ascent, length, radius, *clip, out=moved)
        else:
            _move(start, g, norm, length if not targeted else -length, out=moved)
            _into_ball(moved, centre, norm, radius, out=moved)
        clip_(moved, *clip)
        if moving is not None:
            torch.where(spread(moving, start), moved, start, out=moved)
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
    for (out, start, centre, radii), clip in in_parts(result, (x_adv, x, eps_per_sample), lower, upper, low, high):
        start, centre = cast(start, dtype), cast(centre, dtype)
        moved = out if out.dtype == dtype else BUFFERS.get(2, out, dtype)
        _into_ball(start, centre, norm, amount_of(eps, radii, start), out=moved)
        clip_(moved, *clip)
        if moved is not out:
            out.copy_(moved)
    return result


def box(x: Tensor, eps: float, eps_per_sample: Tensor | None, lower: Bound, upper: Bound) -> tuple[Tensor, Tensor]:
    """The l_inf ball and the clip as one box: clamping to it is clamping to the ball, then to the clip."""
    centre = x.to(compute_dtype(x))
    radius = amount_of(eps, eps_per_sample, centre)
    low, high = centre - radius, centre + radius
    clip_(low, lower, upper)
    clip_(high, lower, upper)
    return low, high


def _move(start: Tensor, grad: Tensor, norm: str, length: float | Tensor, out: Tensor) -> None:
    """out := start + length * direction."""
    if norm in ("2", "1") and grad.dtype == out.dtype and grad.device.type == "cpu" and grad.numel() > 0:
        # A look at the norms: where they are ordinary, no element is NaN or inf, and nothing has to be rescaled.
        norms = norm_of(grad, norm, out)
        smallest, largest = (float(n) for n in norms.aminmax())
        if smallest > _SAFE[0] and largest < _SAFE[1]:
            torch.addcmul(start, grad, length / norms, out=out)
            return
    direction = finite(grad, out)
    if norm == "inf":
        torch.sign(direction, out=out)
    else:
        length = length / _rescale(direction, norm, out=out)
    axpy(length, out, start, out=out)


def _rescale(g: Tensor, norm: str, out: Tensor) -> Tensor:
    """out := each sample of ``g`` scaled so that no norm under- or overflows; returns its norm.

    By a power of two, which changes no bit of the step; no additive epsilon is needed: a zero gradient stays zero, with
    norm 1. For "1-exact" only the largest elements are kept, as ±1.
    """
    largest = one_if_zero(g.abs().amax(dim=inner(g), keepdim=True))
    if norm == "1-exact":
        torch.div(g, largest, out=out).trunc_()  # a correctly rounded division gives 1 for the largest elements alone
    else:
        limit = -math.log2(torch.finfo(g.dtype).tiny)  # 2 to this power, up or down, is a number
        torch.mul(g, largest.log2().floor().clamp(-limit, limit).neg().exp2(), out=out)
    return one_if_zero(norm_of(out, norm))


def _into_ball(z: Tensor, x: Tensor, norm: str, eps: float | Tensor, out: Tensor) -> None:
    """out := z projected; ``out`` may be z. Written so that a sample inside keeps its bits: never x + (z - x)."""
    if isinstance(eps, float) and eps == math.inf:
        if out is not z:
            out.copy_(z)
    elif norm == "inf":
        low, high = BUFFERS.get(0, out), BUFFERS.get(1, out)
        torch.clamp(z, torch.sub(x, eps, out=low), torch.add(x, eps, out=high), out=out)
    elif norm == "1-exact":
        delta = z - x
        threshold = l1_threshold(delta, eps)
        shrunk = delta.sub_(delta.clamp(-threshold, threshold))
        torch.where(threshold > 0, shrunk.add_(x), z, out=out)
    else:
        # Not rescaled as a gradient is: in float32, squares of distances within [1e-18, 1e18] are safe.
        delta = torch.sub(z, x, out=BUFFERS.get(0, out))
        distance = norm_of(delta, norm, delta)
        look = out is z and isinstance(eps, float) and z.device.type == "cpu" and z.numel() > 0
        if look and float(distance.max()) <= eps:
            return  # all are inside
        # lerp returns its second end exactly for weight 1 and its first for weight 0.
        torch.lerp(x, z, torch.where(distance > eps, eps / distance, 1.0), out=out)
