"""Linear operators: what every norm estimate and bound works on, their arithmetic, and what it makes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..reference.linear_map import compute_dtype
from .applying import apply, apply_adjoint, dense
from .function import FunctionProducts
from .protocol import AbstractOperator, OwnProducts, as_batch, check_attributes


class LinearOperator(AbstractOperator):
    """A linear map between spaces of real tensors, given by its products: ``matvec`` and its adjoint ``rmatvec``.

    ``operator_norm``, ``singular_values``, ``operator_norm_interval`` and ``operator_norm_bound`` ("dense", "lanczos")
    work on every operator. Layers have one (``operator_of``), and so have ``ConvOperator``, ``MatrixOperator`` and
    ``LinearOperator.from_function``; operators compose: ``B @ A`` (first A), ``A + B``, ``A - B``, ``c * A``, ``-A``,
    ``A.T``. A subclass defines the two products and calls ``super().__init__``, or sets the attributes itself:

    >>> class Difference(LinearOperator):
    ...     def __init__(self, n):
    ...         super().__init__((n,), (n - 1,), dtype=torch.float64)
    ...     def matvec(self, x):
    ...         return x[..., 1:] - x[..., :-1]
    ...     def rmatvec(self, y):
    ...         return torch.nn.functional.pad(y, (1, 0)) - torch.nn.functional.pad(y, (0, 1))

    Attributes:
        in_shape, out_shape: shapes of one input and one output, without batch dimensions.
        dtype, device: of the tensors that the products take and return.
    """

    __array_ufunc__: ClassVar[None] = None  # NumPy scalars leave ``c * A`` to this class

    def __new__(cls, *args: Any, **kwargs: Any) -> LinearOperator:
        if cls is LinearOperator:
            raise TypeError(
                "LinearOperator is abstract: give a layer to operator_of, a weight to ConvOperator or MatrixOperator, "
                "a function to LinearOperator.from_function, or define a subclass with matvec and rmatvec"
            )
        return super().__new__(cls)

    @staticmethod
    def from_function(
        f: Callable[[Tensor], Tensor],
        in_shape: int | Sequence[int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        batched: bool | None = None,
    ) -> FunctionOperator:
        """The operator of a linear or affine function, less its offset f(0): x -> f(x) - f(0), adjoint by autograd.

        Args:
            f: maps a batch (N, *in_shape) to (N, *out_shape), each sample on its own, as layers do; or one tensor
                (*in_shape) to another. For example a module, or ``lambda x: F.avg_pool2d(x, 3, 2)``. If f takes both,
                it is taken as a map of batches.
            in_shape: shape of one input, e.g. (3, 32, 32).
            dtype, device: of the inputs of f. None: those of a module's first floating-point parameter or buffer; of
                any other function float32 (PyTorch's default) on the CPU.
            batched: whether f maps batches; None: found by trying.

        Raises:
            ValueError: f is not linear or affine (random inputs show it), changes from call to call, or does not map
                such inputs to real tensors. TypeError: f is not callable.
        Warns:
            UserWarning: f takes batches and single tensors, with different results, and ``batched`` was not given.
        """
        return FunctionOperator(f, in_shape, dtype=dtype, device=device, batched=batched)

    def to_dense(self) -> Tensor:
        """The matrix of the operator, (prod(out_shape), prod(in_shape)), in its dtype."""
        return dense(self).to(self.dtype)

    @property
    def T(self) -> LinearOperator:
        """The adjoint operator."""
        return Transposed(self)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        if isinstance(other, Tensor):
            raise TypeError("A @ tensor: use A.matvec(x) for the product with x, and A @ MatrixOperator(m) to compose")
        return Product(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float) -> LinearOperator:
        value = _real(factor)
        return NotImplemented if value is None else Scaled(self, value)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearOperator:
        value = _real(divisor)
        if value == 0:
            raise ValueError("A / 0: give a divisor that is not zero")
        return NotImplemented if value is None else Scaled(self, 1 / value)

    def __neg__(self) -> LinearOperator:
        return Scaled(self, -1.0)


class FunctionOperator(FunctionProducts, LinearOperator):
    """x -> f(x) - f(0); see ``LinearOperator.from_function``."""


class _Composed(OwnProducts, LinearOperator):
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


def _real(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    return float(value) if isinstance(value, Real) else None
