"""Linear operators: the protocol that every norm estimate and bound works on, and what is composed of operators."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..reference.geometry import Geometry
from ..reference.linear_map import compute_dtype

if TYPE_CHECKING:
    from .function import FunctionOperator

_CHUNK = 1 << 26  # elements of the batches that are multiplied at once
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

    def __repr__(self) -> str:
        shapes = (getattr(self, name, "?") for name in _NEEDED[:3])
        return "{}({} -> {}, {})".format(type(self).__name__, *shapes)


class _Composed(LinearOperator):
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


def apply(op: LinearOperator, x: Tensor) -> Tensor:
    """A x for a batch (N, *in_shape); in the precision of ``x`` where the operator can, and with its dtype."""
    return _apply(op, x, op.matvec, "matvec", tuple(op.in_shape), tuple(op.out_shape))


def apply_adjoint(op: LinearOperator, y: Tensor) -> Tensor:
    """A^T y for a batch (N, *out_shape)."""
    return _apply(op, y, op.rmatvec, "rmatvec", tuple(op.out_shape), tuple(op.in_shape))


def _apply(
    op: LinearOperator,
    x: Tensor,
    product: Callable[[Tensor], Tensor],
    name: str,
    domain: tuple[int, ...],
    codomain: tuple[int, ...],
) -> Tensor:
    if takes_batches_of_any_dtype(op):
        return product(x).to(x.dtype)
    batch = x.reshape(-1, *domain).to(op.dtype)
    what = f"{type(op).__name__}.{name}"
    if _takes_batches(op, product, name, domain, codomain):
        result = _checked(product(batch), what, (len(batch), *codomain))
    else:
        result = torch.stack([_checked(product(one), what, codomain) for one in batch])
    return result.to(x.dtype)


def takes_batches_of_any_dtype(op: LinearOperator) -> bool:
    """Whether this is an operator of this package, with the products that it came with."""
    if type(op) in _COMPOSED:
        return True
    return isinstance(op, OwnOperator) and op.has_own_products()


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


def _checked(result: Any, what: str, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(result, Tensor) or tuple(result.shape) != shape:
        given = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"{what} returned {given}, expected shape {shape}")
    if not result.is_floating_point():
        raise TypeError(f"{what} returned dtype {result.dtype}; real floating-point operators are supported")
    return result


def _takes_batches(
    op: LinearOperator,
    product: Callable[[Tensor], Tensor],
    name: str,
    domain: tuple[int, ...],
    codomain: tuple[int, ...],
) -> bool:
    """Whether a user's product maps a batch sample by sample; ``W @ x`` for example takes one vector only."""
    known = op.__dict__.setdefault("_takes_batches", {}) if hasattr(op, "__dict__") else {}
    if name not in known:
        known[name] = maps_batches(product, domain, op.dtype, op.device, codomain)
    answer: bool = known[name]
    return answer


def maps_batches(
    function: Callable[[Tensor], Any],
    domain: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    codomain: tuple[int, ...] | None = None,
) -> bool:
    """Whether ``function`` maps (N, *domain) to (N, *codomain), each sample as it would alone."""
    # A size that no product of matrices takes for that of a vector.
    taken = {*domain, *(codomain or ())}
    n = next(k for k in range(2, 100) if k not in taken)
    x = probe(n, domain, dtype, device, seed=1)
    try:
        whole = function(x)
        alone = function(x[1:2])
    except Exception:  # a user's function can fail in any way; one vector at a time is tried next
        return False
    if not isinstance(whole, Tensor) or not isinstance(alone, Tensor):
        return False
    fits = whole.ndim >= 1 and whole.shape[0] == n and alone.shape == whole[1:2].shape
    if not fits or (codomain is not None and tuple(whole.shape[1:]) != codomain):
        return False
    size = float(whole.abs().max()) if whole.numel() else 0.0
    if size == 0 or not math.isfinite(size):
        return True
    return bool((whole[1:2] - alone).abs().max() <= visible(dtype, device) * size)


def probe(n: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    """The same random vectors (n, *shape) every time."""
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    return x.to(device, dtype)


def visible(dtype: torch.dtype, device: torch.device) -> float:
    """A relative difference that is no rounding, on a GPU TF32's included."""
    return max(5e-3 if device.type == "cuda" else 1e-4, 50 * torch.finfo(dtype).eps)


def dense(op: LinearOperator, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix (m, n), by products with the unit vectors of the smaller side."""
    dtype = dtype or torch.promote_types(op.dtype, torch.float32)
    m, n = math.prod(op.out_shape), math.prod(op.in_shape)
    by_rows = m < n
    shape = op.out_shape if by_rows else op.in_shape
    rows = []
    for part in torch.arange(min(m, n), device=op.device).split(max(1, _CHUNK // max(m, n))):
        units = torch.zeros(len(part), min(m, n), dtype=dtype, device=op.device)
        units[torch.arange(len(part)), part] = 1
        image = apply_adjoint(op, units.reshape(-1, *shape)) if by_rows else apply(op, units.reshape(-1, *shape))
        rows.append(image.reshape(len(part), -1))
    return torch.cat(rows) if by_rows else torch.cat(rows).T


def check_products(op: LinearOperator) -> None:
    """Raise where a user's products are visibly not those of one linear map and its adjoint."""
    for leaf in leaves_of(op):
        check_attributes(leaf)
        if takes_batches_of_any_dtype(leaf):
            continue
        with torch.no_grad():
            _check_leaf(leaf)


def _check_leaf(op: LinearOperator) -> None:
    name, tolerance = type(op).__name__, visible(op.dtype, torch.device(op.device))
    dtype = torch.promote_types(op.dtype, torch.float32)
    x = probe(3, tuple(op.in_shape), dtype, op.device, seed=2)
    y = probe(3, tuple(op.out_shape), dtype, op.device, seed=3)
    x[2] = -2 * (x[0] + x[1])
    forward, back = apply(op, x), apply_adjoint(op, y)
    for what, image in (("matvec", forward), ("rmatvec", back)):
        if not bool(torch.isfinite(image).all()):
            raise ValueError(f"{name}.{what} of a random vector has NaN or infinite elements; the norm is not defined")
    defect = (forward[2] + 2 * (forward[0] + forward[1])).abs().max()
    if bool(defect > tolerance * forward.abs().max()):
        raise ValueError(f"{name}.matvec is not linear: A(-2 (x + y)) differs from -2 (A x + A y)")
    there = forward.double().flatten(1) @ y.double().flatten(1).T  # <A x_i, y_j>
    here = x.double().flatten(1) @ back.double().flatten(1).T
    # Of random vectors a product is about |A x| |y| / sqrt(m).
    size = torch.maximum(there.abs().max(), here.abs().max())
    size = torch.maximum(size, forward.double().norm() * y.double().norm() / 9 / math.sqrt(y[0].numel()))
    if bool((there - here).abs().max() > tolerance * size):
        raise ValueError(
            f"{name}.rmatvec is not the adjoint of matvec: <A x, y> = {float(there[0, 0]):.6g} but <x, A^T y> = "
            f"{float(here[0, 0]):.6g} for random x and y"
        )


def _real(value: Any) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    return float(value) if isinstance(value, Real) else None
