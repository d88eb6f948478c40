"""The largest singular values of an operator: block Lanczos, or the dense matrix where that is small."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..layers.operators import LinearOperator
from ..layers.weighted import as_int
from .estimate import (
    ConvergenceWarning,
    check_operator,
    check_tolerance,
    orthonormal,
    ritz_rotation,
    without_autocast,
)
from .flat import DENSE_LIMIT, FlatOperator, combine, dense_matrices, flattened, inner_products, unit

_SMALL = 1 << 20  # elements of a matrix whose SVD is sooner done than an iteration
_SPARE = 4  # vectors beyond k: they speed up the last of the k
_ORTHOGONAL = 1e-3
_WINDOW = 8  # blocks kept before a restart


def singular_values(
    op: LinearOperator,
    k: int = 1,
    *,
    tol: float = 1e-5,
    max_iterations: int = 200,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The k largest singular values of ``op`` at its own input size, largest first, with their multiplicities.

    Block Golub-Kahan-Lanczos with full reorthogonalisation and thick restarts; estimates from below. A matrix of at
    most 2^20 elements is decomposed instead.

    Args:
        op: the operator.
        k: how many; at most the smaller dimension.
        tol: iterations stop when |A^T u - sigma v| <= tol * (largest sigma) for all k.
        max_iterations: block applications of A and A^T.
        generator: of the random start; None: a fixed seed.

    Returns:
        (k,), in float32 or float64.

    Raises:
        ValueError: k, tol or max_iterations out of range, or a weight with NaN or inf.
    Warns:
        ConvergenceWarning: the iterations ended above ``tol``.
    """
    check_operator(op)
    check_tolerance(tol)
    as_int("max_iterations", max_iterations, minimum=1)
    k = as_int("k", k, minimum=1)
    with without_autocast(op):
        problem = flattened(op, reduce=False)
        most = min(problem.m, problem.n)
        if k > most * problem.groups:
            raise ValueError(f"k={k} exceeds the {most * problem.groups} singular values of {op}")
        size = problem.groups * problem.m * problem.n
        block = min(k, most) + _SPARE
        if size <= _SMALL or (2 * block > most and size <= DENSE_LIMIT):
            values = torch.linalg.svdvals(dense_matrices(problem, "the SVD", "a smaller k"))
        elif 2 * block > most:
            raise ValueError(f"k={k} of {most} singular values is too many to iterate on for {op}; give a smaller k")
        else:
            values = _block_lanczos(problem, min(k, most), block, tol, max_iterations, generator)
        return values.flatten().sort(descending=True).values[:k] * problem.scale


def _block_lanczos(
    problem: FlatOperator, k: int, block: int, tol: float, limit: int, generator: torch.Generator | None
) -> Tensor:
    """The k largest of each group, (G, k)."""
    generator = generator or torch.Generator().manual_seed(0)
    basis = orthonormal(problem.random(block, generator))
    images = problem.matvec(basis)
    for i in range(limit):
        rotation = ritz_rotation(images)
        best = rotation[:, :, :block]
        v, image = combine(best, basis), combine(best, images)
        u, sigma = unit(image)
        # Of a null vector A v is rounding, and says nothing of where to look.
        null = sigma <= 8 * torch.finfo(sigma.dtype).eps * problem.n**0.5 * sigma.amax()
        residual = torch.where(null[:, :, None], 0.0, problem.rmatvec(u) - sigma[:, :, None] * v)
        off = torch.linalg.vector_norm(residual, dim=2)
        worst, largest = off[:k].max(), sigma.max()
        if bool(worst <= tol * largest) or i == limit - 1:
            break
        if basis.shape[0] + block > min(_WINDOW * block, problem.n):
            basis, images = v, image
        # A converged vector's residual is rounding: a random one in its place finds what has been missed, such as
        # further copies of a multiple singular value.
        done = (off <= 0.1 * tol * largest)[:, :, None]
        direction, _ = unit(torch.where(done, problem.random(block, generator), residual))
        for _ in range(2):
            direction = orthonormal(direction - combine(inner_products(basis, direction), basis))
        overlap = inner_products(direction, basis).norm(dim=2).mT[..., None]
        direction = torch.where(overlap < _ORTHOGONAL, direction, 0.0)  # where nothing new was left
        basis = torch.cat([basis, direction])
        images = torch.cat([images, problem.matvec(direction)])
    if worst > tol * largest:
        warnings.warn(
            f"singular_values(k={k}) stopped after {limit} iterations with |A^T u - sigma v| = "
            f"{float(worst / largest):.1e} * sigma, above tol={tol:g}; the values are lower estimates. "
            "Remedy: raise max_iterations, or allow a larger tol",
            ConvergenceWarning,
            stacklevel=3,
        )
    return sigma[:k].T
