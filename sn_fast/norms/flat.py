"""Operators on flat vectors, as the iterations take them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.applying import apply, apply_adjoint
from ..layers.operators import LinearOperator, unscaled
from ..layers.weighted import LayerOperator, in_precision, layer_operator
from ..reference.linear_map import compute_dtype
from ..reference.power import normalized

DENSE_LIMIT = 1 << 26  # elements of a dense matrix, 512 MiB in float64


class Triple(NamedTuple):
    """An estimate per group of channels: sigma (G,), u (G, m), v (G, n) and |A^T u - sigma v| (G,)."""

    sigma: Tensor
    u: Tensor
    v: Tensor
    residual: Tensor


def flattened(op: LinearOperator, *, reduce: bool, exact: bool = False) -> FlatOperator:
    """``op`` on flat vectors; with ``reduce`` in the smallest space, with ``exact`` in float64 as far as it can."""
    factors, core = unscaled(op)
    layer = layer_operator(core)
    if layer is None or 0.0 in factors:
        return _ByProducts(op, exact)
    return _Grouped(layer.reduced() if reduce else layer, factors, exact)


class FlatOperator(ABC):
    """An operator as ``groups`` independent ones on flat vectors: (j, G, n) -> (j, G, m) and back.

    It is scaled to about 1, so that squares neither under- nor overflow: the operator is ``scale`` times this one.
    """

    scale: Tensor
    groups: int
    n: int
    m: int
    dtype: torch.dtype

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """A v, (j, G, n) -> (j, G, m)."""

    @abstractmethod
    def rmatvec(self, u: Tensor) -> Tensor:
        """A^T u, (j, G, m) -> (j, G, n)."""

    def random(self, k: int, generator: torch.Generator | None) -> Tensor:
        """Random unit vectors (k, G, n)."""
        generator = generator or torch.Generator().manual_seed(0)
        v = torch.randn(k, self.groups, self.n, generator=generator, device=generator.device)
        return unit(v.to(self.scale.device, self.dtype))[0]

    def starts(self, k: int, warm: Tensor | None, generator: torch.Generator | None) -> Tensor:
        """Where an iteration begins: the warm vectors (1, G, n), if there are, and k random ones."""
        drawn = self.random(k, generator)
        if warm is None:
            return drawn
        # Groups outside the top one have no warm vector.
        warm = torch.where(warm.abs().amax(dim=2, keepdim=True) > 0, warm.to(drawn), self.random(1, generator))
        return torch.cat([warm, drawn])[: max(k, min(2, self.n))]

    def triple(self, u: Tensor, v: Tensor, value: Tensor) -> tuple[Triple, Tensor]:
        """From u (G, m), v (G, n) with A v = value u: the sharper triple after applying A^T, and A^T u - value v."""
        w = self.rmatvec(u[None])[0]
        residual = w - value[:, None] * v
        direction, sigma = unit(w[None])
        v = torch.where(sigma[0][:, None] > 0, direction[0], v)
        return Triple(sigma[0], u, v, torch.linalg.vector_norm(residual, dim=1)), residual


class _Grouped(FlatOperator):
    """Of a layer: its groups of channels; the weight is scaled to a largest element of 1."""

    def __init__(self, op: LayerOperator, factors: list[float], exact: bool) -> None:
        self.dtype = torch.float64 if exact else compute_dtype(op.weight)
        weight = op.weight.detach().to(self.dtype)
        largest = weight.abs().amax()
        largest = torch.where((largest > 0) & (largest < torch.inf), largest, 1.0)
        self.op = LayerOperator(weight / largest, op.geometry)
        self.scale = largest * abs(math.prod(factors))
        self.groups = op.geometry.groups
        self.n = math.prod(op.in_shape) // self.groups
        self.m = math.prod(op.out_shape) // self.groups

    def matvec(self, v: Tensor) -> Tensor:
        return self.op.matvec(v.reshape(-1, *self.op.in_shape)).reshape(-1, self.groups, self.m)

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.op.rmatvec(u.reshape(-1, *self.op.out_shape)).reshape(-1, self.groups, self.n)


class _ByProducts(FlatOperator):
    """Of an operator that is known by its products alone: one group; scaled by what a random vector shows."""

    groups = 1

    def __init__(self, op: LinearOperator, exact: bool) -> None:
        self.dtype = torch.float64 if exact else torch.promote_types(op.dtype, torch.float32)
        self.op = in_precision(op, self.dtype)
        self.n, self.m = math.prod(op.in_shape), math.prod(op.out_shape)
        self.scale = torch.ones((), dtype=self.dtype, device=op.device)
        largest = self.matvec(self.random(1, None)).abs().amax()
        self.scale = torch.where((largest > 0) & (largest < torch.inf), largest, 1.0)

    def matvec(self, v: Tensor) -> Tensor:
        return apply(self.op, v.reshape(-1, *self.op.in_shape)).reshape(-1, 1, self.m) / self.scale

    def rmatvec(self, u: Tensor) -> Tensor:
        return apply_adjoint(self.op, u.reshape(-1, *self.op.out_shape)).reshape(-1, 1, self.n) / self.scale


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors along the last dimension, zero where ``x`` is zero, and the norms; ``x`` is (j, G, n)."""
    flat = x.reshape(-1, x.shape[-1])
    units, norms = normalized(flat, torch.zeros_like(flat), 1)
    return units.reshape(x.shape), norms.reshape(x.shape[:-1])


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """(G, j, k) of vectors x (j, G, n) and y (k, G, n)."""
    return x.transpose(0, 1) @ y.permute(1, 2, 0)


def combine(rotation: Tensor, vectors: Tensor) -> Tensor:
    """Sums (k, G, n) of vectors (j, G, n) with coefficients (G, j, k)."""
    return (rotation.mT @ vectors.transpose(0, 1)).transpose(0, 1)


def dense_matrices(problem: FlatOperator, what: str, remedy: str) -> Tensor:
    """The matrices (G, m, n) of the groups; raises where they are too large, naming ``what`` wants them."""
    if problem.groups * problem.m * problem.n > DENSE_LIMIT:
        raise ValueError(f"{what} would need {problem.groups} matrices of {problem.m} x {problem.n}; use {remedy}")
    # One column of every group at a time, (n, G, n) -> (n, G, m), or one row if rows are fewer.
    by_rows = problem.m < problem.n
    eye = torch.eye(min(problem.m, problem.n), dtype=problem.dtype, device=problem.scale.device)
    units = eye[:, None, :].expand(-1, problem.groups, -1).contiguous()
    return problem.rmatvec(units).permute(1, 0, 2) if by_rows else problem.matvec(units).permute(1, 2, 0)
