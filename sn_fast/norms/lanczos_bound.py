"""A bound that holds with a chosen probability: Lanczos from a random start."""

from __future__ import annotations

import math

import torch

from ..layers.operators import LinearOperator
from .flat import combine, flattened, inner_products

_ROUNDING = 1e-9  # of float64 Lanczos with full reorthogonalisation, generously


def lanczos_bound(
    op: LinearOperator, tightness: float, delta: float, generator: torch.Generator | None
) -> tuple[float, int]:
    """sigma_hat / sqrt(1 - eps), where sqrt(eps) = ln(1.648 sqrt(n) / delta) / (2 m - 1), after m Lanczos steps.

    Kuczynski and Wozniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms with a random
    start", SIAM J. Matrix Anal. Appl. 1992, theorem 4.2: from a uniformly random start the bound is too small with
    probability delta at most. Groups are independent operators and share delta.

    Returns:
        The bound, and m, which is chosen so that 1 / sqrt(1 - eps) is at most ``tightness``.
    """
    problem = flattened(op, reduce=True, exact=True)
    adjoint = problem.m < problem.n  # iterate in the smaller space
    there, back = (problem.rmatvec, problem.matvec) if adjoint else (problem.matvec, problem.rmatvec)
    n = min(problem.m, problem.n)
    log = math.log(1.648 * math.sqrt(n) * problem.groups / delta)
    steps = min(n, math.ceil((log / math.sqrt(1 - tightness**-2) + 1) / 2))
    generator = generator or _fresh_generator()
    start = torch.randn(1, problem.groups, n, generator=generator, device=generator.device, dtype=torch.float64)
    basis = start.to(problem.scale.device)
    basis /= torch.linalg.vector_norm(basis, dim=-1, keepdim=True)
    images = there(basis)
    for _ in range(1, steps):
        # A^T A v, orthogonalised twice against all before; a space that is exhausted adds zeros, and is exact.
        direction = back(images[-1:])
        before = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        for _ in range(2):
            direction = direction - combine(inner_products(basis, direction), basis)
        after = torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        direction = torch.where(after > 1e-13 * before, direction / after, 0.0)
        basis = torch.cat([basis, direction])
        images = torch.cat([images, there(direction)])
    gram = inner_products(images, images)
    estimate = float(torch.linalg.eigvalsh(gram)[:, -1].max().clamp(min=0).sqrt())
    # After n steps the Krylov space is everything that the start reaches: with probability 1 the top vector is in it.
    root = 0.0 if steps == n else log / (2 * steps - 1)
    value = estimate / math.sqrt(1 - root**2) * (1 + _ROUNDING)
    return (math.nextafter(value * float(problem.scale), math.inf) if value else 0.0), steps


def _fresh_generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator
