"""Iterations until sigma is within a tolerance of a singular value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .lanczos import lanczos_start
from .power_step import Vectors, power_step, starts_of
from .records import is_on_host
from .singular_vectors import LANCZOS_STEPS

ROUNDS = 2
"""Of Lanczos, at most."""
_MARGIN = 0.25


def settled(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str,
    tol: float,
) -> Vectors:
    """``power_step``, and Lanczos from there where the residual of u, v and sigma is above tol * sigma / 4.

    That is told by one iteration more. With unit u and v, and sigma v = A^T u, the residual is |A v - sigma u|^2 =
    |A v|^2 - sigma^2, and the next sigma is at least |A v|: so the residual is below r * sigma if sigma grows by less
    than r^2 / 2 of itself. (A growth below tol says little: on its way from one singular vector to another sigma hardly
    moves. The quarter is a margin for the same reason.) At most two rounds of Lanczos follow, each with two iterations.

    The device chooses which weights go on, so nothing waits for it; only on the host the loop ends early.
    """
    before = power_step(weights, us, vs, geometry, n_iterations, precision)
    found = power_step(weights, before[0], before[1], geometry, 1, precision)
    going = _are_growing(before[2], found[2], tol)
    for _ in range(ROUNDS):
        if is_on_host(weights[0].device) and not bool(torch.stack(going).any()):
            break
        started = lanczos_start(weights, starts_of(found[0], found[1]), geometry, LANCZOS_STEPS)
        left, right = ([x.to(y.dtype) for x, y in zip(new, old)] for new, old in zip(started, (us, vs)))
        before = power_step(weights, left, right, geometry, 1, precision)
        new = power_step(weights, before[0], before[1], geometry, 1, precision)
        u, v, sigma, group = ([torch.where(g, a, b) for g, a, b in zip(going, *columns)] for columns in zip(new, found))
        found = u, v, sigma, group
        going = [g & m for g, m in zip(going, _are_growing(before[2], new[2], tol))]
    return found


def _are_growing(before: Sequence[Tensor], after: Sequence[Tensor], tol: float) -> list[Tensor]:
    """Whether sigmas grow by more than such a residual, and than rounding."""
    least = (_MARGIN * tol) ** 2 / 2
    return [a - b > max(least, 8 * torch.finfo(a.dtype).eps) * a for a, b in zip(after, before, strict=True)]
