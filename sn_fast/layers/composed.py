"""Operators that are composed of others: products, sums, multiples, adjoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..reference.linear_map import compute_dtype
from .applying import apply, apply_adjoint
from .operators import LinearOperator, OwnOperator, as_batch, check_attributes


class _Composed(OwnOperator):
    """An operator made of others, whose products it forms in the precision of its argument, float32 at least."""

    parts: tuple[LinearOperator, ...]

    def __init__(
        self, parts: tuple[LinearOperator, ...], in_shape: tuple[int, ...], out_shape: tuple[int, ...]
    ) -> None:
        for part in parts:
            check_attributes(part)
        devices = {torch.empty(0, device=part.device).device for part in parts}
        if len(devices) > 1:
            raise ValueError(f"operators on different devices do not compose: {', '.join(map(str, parts))}")
        dtype = parts[0].dtype
        for part in parts[1:]:
            dtype = torch.promote_types(dtype, part.dtype)
        super().__init__(in_shape, out_shape, dtype=dtype, device=devices.pop())
        self.parts = parts

    def matvec(self, x: Tensor) -> Tensor:
        return self._batched(x, "x", self.in_shape, self.out_shape, self._forward)

    def rmatvec(self, y: Tensor) -> Tensor:
        return self._batched(y, "y", self.out_shape, self.in_shape, self._adjoint)

    def rebuilt(self, parts: tuple[LinearOperator, ...]) -> LinearOperator:
        """The same composition of other parts."""
        return type(self)(*parts)  # type: ignore[arg-type]

    def _batched(
        self,
        x: Tensor,
        name: str,
        domain: tuple[int, ...],
        codomain: tuple[int, ...],
        function: Callable[[Tensor], Tensor],
    ) -> Tensor:
        batch, lead = as_batch(x, name, domain)
        dtype = torch.promote_types(x.dtype, self.dtype)
        return (
            function(batch.to(compute_dtype(batch, torch.empty(0, dtype=self.dtype))))
            .reshape(*lead, *codomain)
            .to(dtype)
        )

    def _forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Product(_Composed):
    """B A, first A."""

    def __init__(self, b: LinearOperator, a: LinearOperator) -> None:
        if tuple(b.in_shape) != tuple(a.out_shape):
            raise ValueError(
                f"B @ A: outputs of A have shape {a.out_shape}, inputs of B {b.in_shape}; A is {a}, B is {b}"
            )
        super().__init__((b, a), a.in_shape, b.out_shape)

    def _forward(self, x: Tensor) -> Tensor:
        return apply(self.parts[0], apply(self.parts[1], x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return apply_adjoint(self.parts[1], apply_adjoint(self.parts[0], y))

    @property
    def T(self) -> LinearOperator:
        b, a = self.parts
        return Product(a.T, b.T)


class Sum(_Composed):
    """A + B."""

    def __init__(self, a: LinearOperator, b: LinearOperator) -> None:
        if (tuple(a.in_shape), tuple(a.out_shape)) != (tuple(b.in_shape), tuple(b.out_shape)):
            raise ValueError(f"A + B: the operators have different shapes; A is {a}, B is {b}")
        super().__init__((a, b), a.in_shape, a.out_shape)

    def _forward(self, x: Tensor) -> Tensor:
        return apply(self.parts[0], x) + apply(self.parts[1], x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return apply_adjoint(self.parts[0], y) + apply_adjoint(self.parts[1], y)

    @property
    def T(self) -> LinearOperator:
        a, b = self.parts
        return Sum(a.T, b.T)


class Scaled(_Composed):
    """c A for a finite number c."""

    def __init__(self, a: LinearOperator, factor: float) -> None:
        if not math.isfinite(factor):
            raise ValueError(f"c * A: c={factor!r} must be finite")
        super().__init__((a,), a.in_shape, a.out_shape)
        self.factor = factor

    def rebuilt(self, parts: tuple[LinearOperator, ...]) -> LinearOperator:
        return Scaled(parts[0], self.factor)

    def _forward(self, x: Tensor) -> Tensor:
        return self.factor * apply(self.parts[0], x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.factor * apply_adjoint(self.parts[0], y)

    @property
    def T(self) -> LinearOperator:
        return Scaled(self.parts[0].T, self.factor)


class Transposed(_Composed):
    """A^T of an operator that is known by its products alone."""

    def __init__(self, a: LinearOperator) -> None:
        super().__init__((a,), a.out_shape, a.in_shape)

    def _forward(self, x: Tensor) -> Tensor:
        return apply_adjoint(self.parts[0], x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return apply(self.parts[0], y)

    @property
    def T(self) -> LinearOperator:
        return self.parts[0]


_COMPOSED = (Product, Sum, Scaled, Transposed)


def parts_of(op: LinearOperator) -> tuple[LinearOperator, ...]:
    """The operators that ``op`` is composed of; none if it is a leaf."""
    return op.parts if type(op) in _COMPOSED else ()  # type: ignore[attr-defined]


def leaves_of(op: LinearOperator) -> Iterator[LinearOperator]:
    """The operators at the ends of the composition."""
    parts = parts_of(op)
    if not parts:
        yield op
    for part in parts:
        yield from leaves_of(part)


def unscaled(op: LinearOperator) -> tuple[list[float], LinearOperator]:
    """The factors of c * (d * A), and A."""
    factors: list[float] = []
    while type(op) is Scaled:
        factors.append(op.factor)
        op = op.parts[0]
    return factors, op
