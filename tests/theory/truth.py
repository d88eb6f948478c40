"""Capacities by the book: dense matrices of the layers by autograd, and the formulas as they are written."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def dense(layer: nn.Module, x: Tensor) -> Tensor:
    """The matrix of an affine layer at inputs of the shape of x, in float64."""
    layer = layer.double()
    x = torch.zeros(x.shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(layer, x)
    assert isinstance(jacobian, Tensor)
    return jacobian.reshape(-1, x.numel())


def norms(matrices: list[Tensor]) -> tuple[list[float], list[float]]:
    """Spectral and Frobenius norms."""
    return (
        [float(torch.linalg.matrix_norm(m, 2)) for m in matrices],
        [float(torch.linalg.matrix_norm(m)) for m in matrices],
    )


def slope(sigma: list[float]) -> float:
    """L."""
    return math.prod(sigma) * sum(math.prod(sigma[: i + 1]) for i in range(len(sigma)))


def phi(scheme: str, sigma: list[float], frobenius: list[float], **p: float) -> float:
    lipschitz = slope(sigma)
    excess = 0.0
    if scheme == "fgm":
        excess = p["eps"] / p["kappa"] * lipschitz
    elif scheme == "pgm":
        q = 2 * p["alpha"] / p["kappa"] * lipschitz
        excess = p["alpha"] / p["kappa"] * lipschitz * sum(q**t for t in range(int(p["steps"])))
    elif scheme == "wrm":
        excess = lipschitz / (p["lam"] - lipschitz)
    ratios = sum(f**2 / s**2 for f, s in zip(frobenius, sigma))
    return (math.prod(sigma) * (1 + excess)) ** 2 * ratios


PARAMETERS = {
    "erm": {},
    "fgm": {"eps": 0.3, "kappa": 0.2},
    "pgm": {"eps": 0.3, "kappa": 0.2, "alpha": 0.05, "steps": 7},
    "wrm": {"lam": 1e4},
}
