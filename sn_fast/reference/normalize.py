"""W / max(1, sigma / beta) and its gradient with the singular vectors held constant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .eager import is_readable
from .geometry import Geometry, decode
from .linear_map import compute_dtype, matvec, weight_gradient


def normalize(weight: Tensor, sigma: Tensor, beta: float, cap: bool) -> Tensor:
    """W / max(1, sigma / beta) (``cap``; Farnia et al. 2019, section 4), else beta * W / sigma.

    A zero weight stays as it is, and so does any weight under beta = inf with ``cap``.
    """
    return (weight.to(compute_dtype(weight)) / divisor(sigma, beta, cap)).to(weight.dtype)


def normalize_all(
    weights: Sequence[Tensor], sigmas: Sequence[Tensor], betas: Sequence[float], caps: Sequence[bool]
) -> list[Tensor]:
    """``normalize`` of many weights."""
    return [normalize(w, s, b, c) for w, s, b, c in zip(weights, sigmas, betas, caps, strict=True)]


def normalize_backward(
    grad: Tensor,
    weight: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    group: Tensor | None,
    geometry: Sequence[int],
    beta: float,
    cap: bool,
    precision: str = "fp32",
) -> Tensor:
    """Gradient of ``normalize`` in the weight: (beta / sigma) (G - <G, W / sigma> dsigma/dW), G where nothing is cut.

    With u and v constant dsigma/dW is the weight gradient of the layer for the single input v and output gradient u;
    of a grouped convolution (``group`` given) only the rows of the group that attains sigma. ``precision`` is how the
    kernels form products; here they are exact in the tensors' own precision.
    """
    dtype = compute_dtype(grad, weight)
    if group is None and dtype == grad.dtype == weight.dtype == sigma.dtype and is_readable(grad, weight, sigma, u, v):
        found = _backward_number_by_number(grad, weight, sigma, u, v, geometry, beta, cap)
        if found is not None:
            return found
    grad_, weight_ = grad.to(dtype), weight.to(dtype)
    sigma = sigma.to(dtype)
    (geometry_,) = decode(geometry)
    # Where the divisor is the constant 1 nothing flows through sigma, and sigma may be zero there.
    active = sigma > beta if cap else sigma > 0
    inner = torch.where(active, (grad_ * (weight_ / torch.where(active, sigma, 1.0))).sum(), 0.0)
    dsigma = weight_gradient(u.to(dtype), v.to(dtype), weight.shape, geometry_)
    if group is not None:
        dsigma = dsigma * _rows_of_group(group, weight, geometry_)
    return ((grad_ - inner * dsigma) / divisor(sigma, beta, cap)).to(grad.dtype)


def _backward_number_by_number(
    grad: Tensor,
    weight: Tensor,
    sigma: Tensor,
    u: Tensor,
    v: Tensor,
    geometry: Sequence[int],
    beta: float,
    cap: bool,
) -> Tensor | None:
    """``normalize_backward``, the same bits from half of the operations; None for a norm that is zero or not finite."""
    value = sigma.item()
    if not 0.0 < value < torch.inf:
        return None
    ratio = sigma / beta
    if cap and not bool(sigma > beta):
        return grad
    inner = (grad * (weight / sigma)).sum()
    (geometry_,) = decode(geometry)
    result = weight_gradient(u.to(grad.dtype), v.to(grad.dtype), weight.shape, geometry_).mul_(inner)
    return torch.sub(grad, result, out=result).div_(ratio)


def divisor(sigma: Tensor, beta: float, cap: bool) -> Tensor:
    """What the weight is divided by: max(1, sigma / beta), or sigma / beta (1 for a zero weight)."""
    ratio = sigma / beta
    return ratio.clamp(min=1.0) if cap else torch.where(sigma > 0, ratio, torch.where(sigma == 0, 1.0, sigma))


def rayleigh(weight: Tensor, u: Tensor, v: Tensor, group: Tensor | None, geometry: Geometry) -> Tensor:
    """<u, A v> over the group that attains sigma: sigma as a function of the weight, u and v constant."""
    dtype = compute_dtype(weight, u)
    weight = weight.to(dtype)
    image = matvec(v[None].to(dtype), weight, geometry)[0]
    per_group = (image * u.to(dtype)).reshape(geometry.groups, -1).sum(dim=1)
    return per_group[0] if group is None else per_group.gather(0, group.reshape(1)).squeeze(0)


def _rows_of_group(group: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """1 for the rows of the weight that belong to ``group``, 0 elsewhere; broadcasts over the weight."""
    rows = torch.arange(weight.shape[0], device=weight.device) // (weight.shape[0] // geometry.groups)
    return (rows == group).reshape(-1, *[1] * (weight.ndim - 1)).to(compute_dtype(weight))
