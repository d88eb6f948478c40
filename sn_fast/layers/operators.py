"""Linear operators: the protocol that every norm estimate and bound works on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..reference.geometry import Geometry

if TYPE_CHECKING:
    from .function import FunctionOperator

_NEEDED = ("in_shape", "out_shape", "dtype", "device")


class LinearOperator(ABC):
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

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def __new__(cls, *args: Any, **kwargs: Any) -> LinearOperator:
        # LinearOperator(weight, geometry) was a layer's operator before this class became abstract.
        if cls is LinearOperator and any(isinstance(a, Geometry) for a in (*args, *kwargs.values())):
            from .weighted import LayerOperator

            return object.__new__(LayerOperator)
        return super().__new__(cls)

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.in_shape = checked_shape("in_shape", in_shape)
        self.out_shape = checked_shape("out_shape", out_shape)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(f"dtype={dtype!r}: real floating-point operators are supported")
        self.dtype = dtype
        self.device = torch.device(device)

    @abstractmethod
    def matvec(self, x: Tensor) -> Tensor:
        """A x for ``x`` of shape (..., *in_shape); returns (..., *out_shape).

        A subclass may serve one vector (*in_shape) alone, or a batch (N, *in_shape) alone.
        """

    @abstractmethod
    def rmatvec(self, y: Tensor) -> Tensor:
        """A^T y for ``y`` of shape (..., *out_shape); returns (..., *in_shape)."""

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
        from .function import FunctionOperator

        return FunctionOperator(f, in_shape, dtype=dtype, device=device, batched=batched)

    def to_dense(self) -> Tensor:
        """The matrix of the operator, (prod(out_shape), prod(in_shape)), in its dtype."""
        from .applying import dense

        return dense(self).to(self.dtype)

    @property
    def T(self) -> LinearOperator:
        """The adjoint operator."""
        from . import composed

        return composed.Transposed(self)

    def __matmul__(self, other: LinearOperator) -> LinearOperator:
        from . import composed

        if isinstance(other, Tensor):
            raise TypeError("A @ tensor: use A.matvec(x) for the product with x, and A @ MatrixOperator(m) to compose")
        return composed.Product(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __add__(self, other: LinearOperator) -> LinearOperator:
        from . import composed

        return composed.Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        from . import composed

        return composed.Sum(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float) -> LinearOperator:
        from . import composed

        value = _real(factor)
        return NotImplemented if value is None else composed.Scaled(self, value)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> LinearOperator:
        from . import composed

        value = _real(divisor)
        if value == 0:
            raise ValueError("A / 0: give a divisor that is not zero")
        return NotImplemented if value is None else composed.Scaled(self, 1 / value)

    def __neg__(self) -> LinearOperator:
        from . import composed

        return composed.Scaled(self, -1.0)

    def __repr__(self) -> str:
        shapes = (getattr(self, name, "?") for name in _NEEDED[:3])
        return "{}({} -> {}, {})".format(type(self).__name__, *shapes)


class OwnOperator(LinearOperator):
    """An operator of this package: its products take any leading dimensions and every dtype.

    A subclass, or an instance, that overrides one of ``_OWN`` is a user's operator.
    """

    _OWN: ClassVar[tuple[str, ...]] = ("matvec", "rmatvec")

    def has_own_products(self) -> bool:
        own = next(c for c in type(self).__mro__ if c.__module__.startswith(f"{__package__}."))
        return not any(
            name in vars(self) or getattr(type(self), name, None) is not getattr(own, name, None) for name in self._OWN
        )


def check_attributes(op: LinearOperator) -> None:
    """Raise unless ``op`` has shapes, dtype and device."""
    missing = [name for name in _NEEDED if not hasattr(op, name)]
    if missing:
        raise TypeError(
            f"the operator {type(op).__name__} has no {', '.join(missing)}: call super().__init__(in_shape, out_shape, "
            "dtype=..., device=...) or set the attributes"
        )
    checked_shape("in_shape", op.in_shape)
    checked_shape("out_shape", op.out_shape)


def checked_shape(name: str, value: Any) -> tuple[int, ...]:
    """``value`` as a shape without zeros."""
    try:
        shape = tuple(int(n) for n in value) if isinstance(value, Sequence) else (int(value),)
    except (TypeError, ValueError):
        shape = (0,)
    if any(n < 1 for n in shape):
        raise ValueError(f"{name}={value!r}: give the shape of one vector, e.g. (3, 32, 32), without zeros")
    return shape


def as_batch(x: Tensor, name: str, domain: tuple[int, ...]) -> tuple[Tensor, torch.Size]:
    """(..., *domain) as (N, *domain), and the leading dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}; give a tensor")
    lead = x.shape[: max(0, x.ndim - len(domain))]
    if tuple(x.shape[len(lead) :]) != tuple(domain):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected (..., {', '.join(map(str, domain))})")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}; give a floating-point tensor")
    return x.reshape(-1, *domain), lead


def _real(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    return float(value) if isinstance(value, Real) else None
