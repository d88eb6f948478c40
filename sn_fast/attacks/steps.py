"""Single updates, for attack loops of your own. ``pgd`` and ``wrm`` are built from the same operators.

The functions return a new tensor, outside autograd, laid out as x_adv (as x in ``random_start``), and wait for no
device: numbers are checked, the values inside tensors are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import steps as ops
from ..ops.library import has_kernels
from ..reference.linear_map import compute_dtype
from .arguments import (
    Amount,
    Clip,
    Norm,
    OneBound,
    amount,
    bounds,
    canonical_norm,
    check_like,
    check_per_sample,
    check_samples,
    number,
)


def pgd_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    norm: Norm,
    eps: float | Tensor,
    alpha: float | Tensor,
    clip: Clip = None,
    targeted: bool = False,
    active: Tensor | None = None,
) -> Tensor:
    """One step of projected gradient ascent: alpha along the gradient, back into the ball around x, then into clip.

    Directions are sign(g) for inf (Madry et al. 2018), g / |g|_2 for 2, and for 1 the published g / |g|_1 with a radial
    projection (Farnia, Zhang, Tse 2019). "L1-exact" moves the elements of largest |g| and projects to the nearest point
    of the l1 ball (Duchi et al. 2008); with ``clip`` it fills the elements of largest |g| that have room up to their
    bounds, and the ball takes from the others, so the steps of a linear loss end at its maximum. The gradient's scale
    does not matter; a sample whose gradient is zero does not move, and a non-finite element counts as 0.

    Args:
        x_adv, x: current and clean samples, (B, *size), of one dtype. float16 and bfloat16 are computed in float32.
        grad: gradient of the loss in x_adv, (B, *size), any floating dtype.
        norm: inf, 2, 1 or "L1-exact", also as "Linf", "L2", "L1".
        eps: radius in the units of x, >= 0; a number or one per sample (B,); inf: no ball.
        alpha: length of the step, in the units of x; a number or one per sample (B,).
        clip: (lower, upper), numbers or tensors that broadcast to x (C values: per channel), None on a side without a
            limit; applied after the ball. Whether x lies within is not checked here.
        targeted: descend instead.
        active: bool (B,); samples with False keep their bits.

    Returns:
        The new x_adv (B, *size).

    Raises:
        ValueError: shapes or devices that differ, an unknown norm, a negative or NaN number, lower > upper.
        TypeError: samples that are not floating-point tensors, or differ in dtype.
    """
    _check(x_adv, x, grad)
    if active is not None:
        check_per_sample("active", active, x)
        if active.dtype != torch.bool:
            raise TypeError(f"active must be a bool tensor, got {active.dtype}; convert it with active.bool()")
    order = canonical_norm(norm)
    radius = amount("eps", eps, x, finite=False)
    stride = amount("alpha", alpha, x, finite=True)
    lower, upper = bounds(clip, x)
    amounts = (radius.value, stride.value, radius.per_sample, stride.per_sample)
    return ops.pgd_step(x_adv, x, grad, order, *amounts, lower, upper, targeted, active)


def wrm_step(x_adv: Tensor, x: Tensor, grad: Tensor, *, eps: float | Tensor, step: float, clip: Clip = None) -> Tensor:
    """One ascent step on loss(z) - |z - x|^2 / (2 eps): x_adv + step (eps g - (x_adv - x)), the inner step of WRM.

    Sinha, Namkoong, Duchi 2018, with eps = 1 / (2 gamma) as in Farnia, Zhang, Tse 2019. There is no ball.

    Args:
        x_adv, x, grad, clip: as in ``pgd_step``.
        eps: >= 0, in units of x per unit of gradient; a number or one per sample (B,).
        step: >= 0; 1 jumps to x + eps g.

    Returns:
        The new x_adv (B, *size).

    Raises:
        ValueError, TypeError: as in ``pgd_step``.
    """
    _check(x_adv, x, grad)
    radius = amount("eps", eps, x, finite=True)
    step = number("step", step, finite=True)
    lower, upper = bounds(clip, x)
    return ops.wrm_step(x_adv, x, grad, radius.value, radius.per_sample, step, lower, upper)


def project(x_adv: Tensor, x: Tensor, *, norm: Norm, eps: float | Tensor, clip: Clip = None) -> Tensor:
    """x_adv brought into the ball of radius eps around x, then clipped; samples already inside keep their bits.

    For inf, 2 and "L1-exact" (Duchi et al. 2008, Fig. 1) that is the nearest point of the ball; for 1 the published
    radial x + d / max(1, |d|_1 / eps). Clipping can only shorten the perturbation of an x that is itself within clip.

    Args:
        x_adv, x: (B, *size), of one dtype; norm, eps, clip: as in ``pgd_step``.

    Returns:
        The projected x_adv (B, *size). It can lie outside by the rounding of x_adv.

    Raises:
        ValueError, TypeError: as in ``pgd_step``.
    """
    _check(x_adv, x)
    order = canonical_norm(norm)
    radius = amount("eps", eps, x, finite=False)
    lower, upper = bounds(clip, x)
    return ops.project(x_adv, x, order, radius.value, radius.per_sample, lower, upper)


@torch.no_grad()
def random_start(
    x: Tensor,
    *,
    norm: Norm,
    eps: float | Tensor,
    clip: Clip = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A point drawn uniformly from the ball of radius eps around x, then clipped.

    Args:
        x: (B, *size); norm, eps, clip: as in ``pgd_step``, with a finite eps; 1 and "L1-exact" are the same ball.
        generator: source of randomness, on any device; None: PyTorch's default for x's device. Where the compiled
            kernels run they take one number from it, and so draw other points than plain PyTorch does.

    Returns:
        A new tensor (B, *size), laid out as x; equal values for every layout of x.

    Raises:
        ValueError, TypeError: as in ``pgd_step``.
    """
    check_samples(x)
    order = canonical_norm(norm)
    radius = amount("eps", eps, x, finite=True)
    return random_point(x, order, radius, *bounds(clip, x), generator)


def random_point(
    x: Tensor, norm: str, eps: Amount, lower: OneBound, upper: OneBound, generator: torch.Generator | None
) -> Tensor:
    """``random_start`` with checked arguments."""
    if x.numel() == 0:
        return x.clone()
    dtype = compute_dtype(x)
    device = x.device if generator is None else generator.device
    if has_kernels(x.device) and dtype == torch.float32:
        # From one number drawn with the generator, the kernel makes as many as it needs.
        seed = torch.empty((), dtype=torch.int64, device=device).random_(generator=generator).to(x.device)
        return ops.random_start(x, norm, eps.value, eps.per_sample, lower, upper, seed)

    def sample(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # A density that depends on the norm alone gives a uniform direction: Gauss for l2, Laplace for l1.
    if norm == "inf":
        delta = sample(*x.shape).uniform_(-1.0, 1.0, generator=generator)
    elif norm == "2":
        delta = sample(*x.shape).normal_(generator=generator)
    else:
        delta = sample(*x.shape).exponential_(generator=generator)
        delta -= sample(*x.shape).exponential_(generator=generator)
    if norm != "inf":
        flat = delta.flatten(1)
        # The volume inside radius r is r^D: a radius drawn as r itself would pile up at the centre.
        length = sample(x.shape[0], 1).uniform_(generator=generator) ** (1 / flat.shape[1])
        drawn = torch.linalg.vector_norm(flat, 2 if norm == "2" else 1, dim=1, keepdim=True)
        flat *= length / drawn.clamp(min=torch.finfo(dtype).tiny)
    scale = eps.value if eps.per_sample is None else eps.per_sample.reshape(-1, *[1] * (x.dim() - 1))
    start = torch.add(x, delta.to(x.device) * scale, out=torch.empty_like(x))
    return ops.project(start, x, norm, eps.value, eps.per_sample, lower, upper)


def _check(x_adv: Tensor, x: Tensor, grad: Tensor | None = None) -> None:
    check_samples(x)
    check_like("x_adv", x_adv, x)
    if grad is not None:
        check_like("grad", grad, x, any_dtype=True)
