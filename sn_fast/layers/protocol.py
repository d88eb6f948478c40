"""The least that an operator is: shapes, dtype, device, and its two products. No arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

_NEEDED = ("in_shape", "out_shape", "dtype", "device")


class AbstractOperator(ABC):
    """The core of ``LinearOperator``, which says what its attributes and products are."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

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

    def __repr__(self) -> str:
        shapes = (getattr(self, name, "?") for name in _NEEDED[:3])
        return "{}({} -> {}, {})".format(type(self).__name__, *shapes)


class OwnProducts(AbstractOperator):
    """An operator of this package: its products take any leading dimensions and every dtype.

    A subclass, or an instance, that overrides one of ``_OWN`` is a user's operator.
    """

    _OWN: ClassVar[tuple[str, ...]] = ("matvec", "rmatvec")

    def has_own_products(self) -> bool:
        own = next(c for c in type(self).__mro__ if c.__module__.startswith(f"{__package__}."))
        return not any(
            name in vars(self) or getattr(type(self), name, None) is not getattr(own, name, None) for name in self._OWN
        )


def check_attributes(op: AbstractOperator) -> None:
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
