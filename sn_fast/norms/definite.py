"""Proof that matrices have no eigenvalue above a limit: a Cholesky factorisation that succeeds.

If Cholesky's algorithm runs to its end on a Hermitian H in floating point, H + E is positive semidefinite for some E
with |E| <= gamma_{n+1} / (1 - gamma_{n+1}) trace(H) (Rump, "Verification of positive definiteness", BIT 2006; the
constant here is four times that, for complex arithmetic). With H = limit I - G that bounds the eigenvalues of G, for
n^3 / 3 multiplications: less than one squaring of G, and without the rank^(1/2^t) that t squarings leave on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from .symbol import UNIT_ROUNDOFF

_GROWTH = 8
_EIGENVALUE_WORK = 1 << 20  # multiplications that finding the next limit may cost beyond one matrix


def eigenvalue_bound(
    grams: Iterable[Tensor],
    *,
    start: float = 0.0,
    slack: float = 2e-4,
    give_up: float = math.inf,
    find_eigenvalues: bool = True,
) -> float:
    """A number that no eigenvalue of any of the matrices exceeds, about (1 + slack) times the largest of them.

    Args:
        grams: chunks (..., n, n) of positive semidefinite Hermitian matrices, float64 or complex128, best in random
            order.
        start: a first guess, such as what power iteration found.
        slack: how far above the largest eigenvalue the limit is put, relative.
        find_eigenvalues: where a limit does not hold, take the next from an eigenvalue; else from the limit, in steps
            that grow.
        give_up: a value above which the answer does not matter: it is infinity if an eigenvalue exceeds this.

    Returns:
        The bound for the exact matrices that were given, rounding of the proof included.
    """
    limit, n = start * (1 + slack), 1
    for chunk in grams:
        n = chunk.shape[-1]
        left = chunk.reshape(-1, n, n)
        means = left.diagonal(dim1=-2, dim2=-1).real.mean(dim=-1)
        left = _select(means > 0, left)  # the others are zero
        while len(left := _select(~has_eigenvalues_below(left, limit), left)):
            # A matrix drawn from those that remain exceeds half of them on average, so a few rounds suffice.
            largest = float(means.max())
            if find_eigenvalues:
                probes = left[:: max(1, len(left) * n**3 // _EIGENVALUE_WORK)]
                largest = max(largest, float(torch.linalg.eigvalsh(probes)[:, -1].max()))
            else:
                slack *= _GROWTH
            if largest > give_up:
                return math.inf
            limit = max(limit, largest) * (1 + slack)
    return limit * (1 + 4 * (n + 2) * n * UNIT_ROUNDOFF)


def _select(mask: Tensor, matrices: Tensor) -> Tensor:
    """The matrices selected by ``mask``; no copy if all are."""
    return matrices if bool(mask.all()) else matrices[mask]


def has_eigenvalues_below(matrices: Tensor, limit: float) -> Tensor:
    """Whether limit I - G has a Cholesky factor, for each matrix G."""
    if limit <= 0:
        return matrices.new_zeros(len(matrices), dtype=torch.bool)
    shifted = -matrices
    shifted.diagonal(dim1=-2, dim2=-1).add_(limit)
    # Transposed, which is as definite, it is laid out as the factorisation works, in place.
    info = torch.empty(len(shifted), dtype=torch.int32, device=matrices.device)
    return torch.linalg.cholesky_ex(shifted.mT, out=(shifted.mT, info)).info == 0
