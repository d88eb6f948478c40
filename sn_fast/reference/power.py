"""Power iteration of many operators at once: one forward and one adjoint application per iteration and operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .eager import is_readable
from .geometry import Geometry, decode
from .linear_map import compute_dtype, matvec, rmatvec


def power_step(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str = "fp32",
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Advance every operator by ``n_iterations`` power iterations (Farnia et al. 2019, Algorithm 1).

    A convolution starts from v: u = A v / |A v|, w = A^T u, sigma = |w|, v = w / sigma; a matrix starts from u:
    v = A^T u / |.|, w = A v, sigma = |w|, u = w / sigma. Both are the published order, and sigma equals the published
    <A v_new, u> without a third application.

    Groups of a convolution are independent operators: each has its own unit pair in u and v, and sigma is the largest.

    Args:
        weights: per operator (Cout, Cin / groups, *kernel), transposed (Cin, Cout / groups, *kernel), or (out, in).
        us, vs: per operator the left (Cout, *output_size) and right (Cin, *input_size) vectors; need not be unit.
        geometry: the operators' geometries, encoded one after the other.
        precision: how the kernels form products; here they are always exact in the tensors' own precision.

    Returns:
        Lists of u, v (as given), sigma (scalar, float32 at least) and the group that attains sigma (scalar int64).
    """
    advanced = [
        _power_step(w, u, v, g, n_iterations) for w, u, v, g in zip(weights, us, vs, decode(geometry), strict=True)
    ]
    u, v, sigma, group = (list(column) for column in zip(*advanced)) if advanced else ([], [], [], [])
    return u, v, sigma, group


def _power_step(
    weight: Tensor, u: Tensor, v: Tensor, geometry: Geometry, n_iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(weight, u)
    weight, x, y = weight.to(dtype), v[None].to(dtype), u[None].to(dtype)
    for _ in range(n_iterations):
        if geometry.axes:
            y, _ = normalized(matvec(x, weight, geometry), y, geometry.groups)
            x, norms = normalized(rmatvec(y, weight, geometry), x, geometry.groups)
        else:
            x, _ = normalized(rmatvec(y, weight, geometry), x, geometry.groups)
            y, norms = normalized(matvec(x, weight, geometry), y, geometry.groups)
    sigma, group = norms[0].max(dim=0) if geometry.groups > 1 else (norms[0, 0], norms.new_zeros((), dtype=torch.int64))
    return y[0].to(u.dtype).contiguous(), x[0].to(v.dtype).contiguous(), sigma, group


def sigma_through_last_iteration(weight: Tensor, start: Tensor, geometry: Geometry) -> Tensor:
    """sigma of one power iteration from ``start`` (v of a convolution, u of a matrix), differentiable in the weight.

    This is the published code's gradient, which flows through both u and v.
    """
    dtype = compute_dtype(weight, start)
    weight, x = weight.to(dtype), start[None].to(dtype)
    there, back = (matvec, rmatvec) if geometry.axes else (rmatvec, matvec)
    y = there(x, weight, geometry)
    y, _ = normalized(y, torch.zeros_like(y), geometry.groups)
    _, norms = normalized(back(y, weight, geometry), x, geometry.groups)
    return norms[0].amax()


def normalized(x: Tensor, fallback: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Each group of channels of ``x`` (N, C, *size) divided by its norm, and the norms (N, groups).

    Scaled by the largest element first, so a norm neither under- nor overflows and is zero only for a zero vector;
    a zero or non-finite group keeps ``fallback``, so that a layer that starts at zero can be iterated on later.
    """
    if groups == 1 and x.shape[0] == 1 and is_readable(x):
        found = _normalized_number_by_number(x)
        if found is not None:
            return found
    flat = x.reshape(x.shape[0], groups, -1)
    largest = flat.detach().abs().amax(dim=2, keepdim=True)
    alive = (largest > 0) & (largest < torch.inf)
    flat = flat / torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(flat, dim=2, keepdim=True)
    unit = torch.where(alive, flat / torch.where(alive, norms, 1.0), fallback.reshape(flat.shape))
    return unit.reshape(x.shape), (norms * largest).squeeze(2)


def _normalized_number_by_number(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """``normalized`` of one vector, the same bits from a third of the operations; None of a zero or non-finite one."""
    largest = x.abs().amax()
    if not 0.0 < largest.item() < torch.inf:
        return None
    flat = x.reshape(1, 1, -1) / largest
    norms = torch.linalg.vector_norm(flat, dim=2, keepdim=True)
    return flat.div_(norms).reshape(x.shape), (norms * largest).squeeze(2)
