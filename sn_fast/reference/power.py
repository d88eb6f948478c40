"""Power iteration of many operators at once: one forward and one adjoint application per iteration and operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .eager import is_readable
from .geometry import Geometry, decode
from .linear_map import compute_dtype, matvec, rmatvec

# Norms of vectors whose squares neither over- nor underflow, but for elements that do not count.
_LEAST, _LARGEST = 1e-10, 1e15

Operator: TypeAlias = "tuple[Tensor, Tensor, Tensor, Geometry]"
"""Weight, u, v and geometry."""
Advanced: TypeAlias = "tuple[Tensor, Tensor, Tensor, Tensor]"
"""u, v, sigma and the group that attains it."""


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
    operators = list(zip(weights, us, vs, decode(geometry), strict=True))
    listed = [i for i, operator in enumerate(operators) if _is_plain(*operator)]
    found: dict[int, Advanced] = {}
    if len(listed) > 1 and n_iterations > 0:
        together = _power_steps([operators[i] for i in listed], n_iterations)
        found = {i: result for i, result in zip(listed, together) if result is not None}
    advanced = [found.get(i) or _power_step(*operator, n_iterations) for i, operator in enumerate(operators)]
    u, v, sigma, group = (list(column) for column in zip(*advanced)) if advanced else ([], [], [], [])
    return u, v, sigma, group


def _is_plain(weight: Tensor, u: Tensor, v: Tensor, geometry: Geometry) -> bool:
    """Without groups, and in the precision of the iteration: no copies of many weights at a time."""
    return geometry.groups == 1 and weight.dtype == compute_dtype(weight, u) and is_readable(weight, u, v)


def _power_steps(operators: Sequence[Operator], n_iterations: int) -> list[Advanced | None]:
    """``_power_step`` of many plain operators, the same bits, their norms and quotients in one call each.

    None for those with a zero or not finite vector, or one far from 1.
    """
    weights = [w for w, _, _, _ in operators]
    geometries = [g for _, _, _, g in operators]
    x = [(v if g.axes else u)[None].to(w.dtype) for w, u, v, g in operators]
    alive = [True] * len(operators)
    for _ in range(n_iterations):
        y = [(matvec if g.axes else rmatvec)(a, w, g) for a, w, g in zip(x, weights, geometries)]
        y, _ = _units(y, alive)
        x = [(rmatvec if g.axes else matvec)(a, w, g) for a, w, g in zip(y, weights, geometries)]
        x, norms = _units(x, alive)
    found: list[Advanced | None] = []
    for (_, u, v, g), start, image, sigma, is_alive in zip(operators, x, y, norms, alive):
        new_u, new_v = (image, start) if g.axes else (start, image)
        result = new_u[0].to(u.dtype), new_v[0].to(v.dtype), sigma, sigma.new_zeros((), dtype=torch.int64)
        found.append(result if is_alive else None)
    return found


def _units(vectors: list[Tensor], alive: list[bool]) -> tuple[list[Tensor], list[Tensor]]:
    """Each vector (1, C, *size) divided by its norm, and the norms; those that cannot be are marked in ``alive``."""
    vectors = [x.contiguous() for x in vectors]
    norms = torch._foreach_norm(vectors)
    for i, norm in enumerate(norms):
        alive[i] &= _LEAST < norm.item() < _LARGEST
    return list(torch._foreach_div(vectors, norms)), list(norms)


def _power_step(weight: Tensor, u: Tensor, v: Tensor, geometry: Geometry, n_iterations: int) -> Advanced:
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

    Scaled by a power of two first, so a norm neither under- nor overflows and is zero only for a zero vector;
    a zero or non-finite group keeps ``fallback``, so that a layer that starts at zero can be iterated on later.
    """
    if groups == 1 and x.shape[0] == 1 and is_readable(x):
        found = _normalized_number_by_number(x)
        if found is not None:
            return found
    flat = x.reshape(x.shape[0], groups, -1)
    largest = flat.detach().abs().amax(dim=2, keepdim=True)
    alive = (largest > 0) & (largest < torch.inf)
    limit = -math.log2(torch.finfo(x.dtype).tiny)
    exponent = torch.log2(torch.where(alive, largest, 1.0)).floor().clamp(-limit, limit)
    scale = torch.exp2(exponent)
    flat = flat / scale
    norms = torch.linalg.vector_norm(flat, dim=2, keepdim=True)
    unit = torch.where(alive, flat / torch.where(alive, norms, 1.0), fallback.reshape(flat.shape))
    return unit.reshape(x.shape), (norms * scale).squeeze(2)


def _normalized_number_by_number(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """``normalized`` of one vector, the same bits from a third of the operations; None of one that is far from 1."""
    flat = x.reshape(1, 1, -1)
    norms = torch.linalg.vector_norm(flat, dim=2, keepdim=True)
    if not _LEAST < norms.item() < _LARGEST:
        return None
    return (flat / norms).reshape(x.shape), norms.squeeze(2)
