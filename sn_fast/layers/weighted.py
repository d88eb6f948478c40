"""Operators of layers, given by a weight and a geometry: what a layer does to its input, bias aside."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..reference import linear_map
from ..reference.geometry import PADDING_MODES, Axis, Geometry
from .operators import LinearOperator, parts_of
from .protocol import OwnProducts, as_batch

Padding = int | str | Sequence[int | tuple[int, int]]


class LayerOperator(OwnProducts, LinearOperator):
    """The linear map of a weight and a geometry: ``matvec`` and its adjoint ``rmatvec``.

    A subclass that overrides the products is measured by them, not by its weight.

    Attributes:
        weight: the layer's weight (not copied; gradients flow to it).
        in_shape, out_shape: shapes of one input and one output, without batch dimensions.
    """

    _OWN = ("matvec", "rmatvec", "_apply", "to_dense", "reduced")

    weight: Tensor
    geometry: Geometry

    def __init__(self, weight: Tensor, geometry: Geometry) -> None:
        self.weight = weight
        self.geometry = geometry
        self.in_shape = geometry.in_shape(weight.shape)
        self.out_shape = geometry.out_shape(weight.shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.weight.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.weight.device

    def matvec(self, x: Tensor) -> Tensor:
        """A x for ``x`` of shape (..., *in_shape); returns (..., *out_shape).

        Half precision is computed in float32; the result has the promoted dtype of ``x`` and the weight.
        """
        return self._apply(linear_map.matvec, "x", x, *self._shapes())

    def rmatvec(self, y: Tensor) -> Tensor:
        """A^T y for ``y`` of shape (..., *out_shape); returns (..., *in_shape)."""
        return self._apply(linear_map.rmatvec, "y", y, *self._shapes()[::-1])

    def to_dense(self) -> Tensor:
        """The matrix of the operator, (prod(out_shape), prod(in_shape)), in the weight's dtype."""
        if not self.has_own_products():
            return super().to_dense()
        columns = math.prod(self.in_shape)
        eye = torch.eye(columns, dtype=self.weight.dtype, device=self.weight.device)
        return self.matvec(eye.reshape(columns, *self.in_shape)).reshape(columns, -1).T

    def reduced(self) -> LayerOperator:
        """An operator of the same norm in the smallest space: axes whose windows share no input are collapsed."""
        return LayerOperator(self.weight, self.geometry.reduced())

    @property
    def T(self) -> LinearOperator:
        """The adjoint: of a convolution the transposed one with the same weight, and the other way round."""
        if not self.has_own_products():
            return super().T
        if not self.geometry.axes:
            return LayerOperator(self.weight.T, self.geometry)
        return LayerOperator(self.weight, replace(self.geometry, transposed=not self.geometry.transposed))

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of this weight's map: a subclass that maps further has other shapes of its own."""
        return self.geometry.in_shape(self.weight.shape), self.geometry.out_shape(self.weight.shape)

    def _apply(
        self,
        function: Callable[[Tensor, Tensor, Geometry], Tensor],
        name: str,
        x: Tensor,
        domain: tuple[int, ...],
        codomain: tuple[int, ...],
    ) -> Tensor:
        batch, lead = as_batch(x, name, domain)
        dtype = linear_map.compute_dtype(x, self.weight)
        result = function(batch.to(dtype), self.weight.to(dtype), self.geometry)
        return result.reshape(*lead, *codomain).to(torch.promote_types(x.dtype, self.weight.dtype))


class ConvOperator(LayerOperator):
    """The linear map of a 1d, 2d or 3d convolution (or transposed convolution) for one input size, without bias.

    Args:
        weight: (Cout, Cin / groups, *kernel); transposed (Cin, Cout / groups, *kernel).
        input_size: spatial size of the layer's input, e.g. ``(32, 32)``.
        stride, dilation, output_padding: int, or one per axis.
        padding: int, one int or (before, after) pair per axis, "same" (stride 1) or "valid".
        groups, padding_mode, transposed: as in PyTorch's layers.

    Raises:
        ValueError, TypeError: an argument does not describe a convolution; the message names it.
    """

    def __init__(
        self,
        weight: Tensor,
        input_size: int | Sequence[int],
        *,
        stride: int | Sequence[int] = 1,
        padding: Padding = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        transposed: bool = False,
        output_padding: int | Sequence[int] = 0,
    ) -> None:
        check_weight(weight, dims=(3, 4, 5))
        n = weight.ndim - 2
        sizes = per_axis("input_size", input_size, n, minimum=1)
        strides = per_axis("stride", stride, n, minimum=1)
        dilations = per_axis("dilation", dilation, n, minimum=1)
        extra = per_axis("output_padding", output_padding, n, minimum=0)
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"padding_mode={padding_mode!r} is unknown; choose one of {', '.join(PADDING_MODES)}")
        groups = as_int("groups", groups, minimum=1)
        if weight.shape[0] % groups:
            raise ValueError(f"groups={groups} does not divide the weight's first dimension {weight.shape[0]}")
        if transposed and padding_mode != "zeros":
            raise ValueError(f"padding_mode={padding_mode!r} does not exist for a transposed convolution; use 'zeros'")
        if any(extra) and not transposed:
            raise ValueError(f"output_padding={output_padding!r} needs transposed=True")
        kernel = tuple(weight.shape[2:])
        pads = conv_pads(padding, kernel, strides, dilations, transposed)
        axes = tuple(
            _transposed_axis(i, sizes[i], kernel[i], strides[i], dilations[i], pads[i], extra[i])
            if transposed
            else _axis(i, sizes[i], kernel[i], strides[i], dilations[i], pads[i], padding_mode)
            for i in range(n)
        )
        super().__init__(weight, Geometry(axes, groups, transposed, padding_mode))


class MatrixOperator(LayerOperator):
    """The linear map x -> W x of a matrix ``weight`` of shape (out, in)."""

    def __init__(self, weight: Tensor) -> None:
        check_weight(weight, dims=(2,))
        super().__init__(weight, Geometry())


def layer_operator(op: LinearOperator) -> LayerOperator | None:
    """``op`` if it is the map of its weight and geometry; None for an operator that is known by its products alone."""
    return op if isinstance(op, LayerOperator) and op.has_own_products() else None


def in_precision(op: LinearOperator, dtype: torch.dtype) -> LinearOperator:
    """The same operator with weights of this dtype, as far as it is made of weights."""
    layer = layer_operator(op)
    if layer is not None:
        return LayerOperator(layer.weight.detach().to(dtype), layer.geometry)
    parts = parts_of(op)
    return op.rebuilt(tuple(in_precision(part, dtype) for part in parts)) if parts else op  # type: ignore[attr-defined]


def check_weight(weight: Tensor, dims: Sequence[int]) -> None:
    """Raise unless ``weight`` is a floating-point tensor of one of these numbers of dimensions, and not empty."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight is a {type(weight).__name__}; give a tensor")
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; real floating-point weights are supported")
    if weight.ndim not in dims:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected {' or '.join(map(str, dims))} dimensions")
    if weight.numel() == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: it is empty")


def is_dtensor(weight: object) -> bool:
    """Whether a weight is a DTensor: of a sharded or tensor-parallel layer."""
    return hasattr(weight, "device_mesh") and hasattr(weight, "placements")


def per_axis(name: str, value: int | Sequence[int], n: int, minimum: int) -> tuple[int, ...]:
    """``value`` as ``n`` integers, each at least ``minimum``."""
    try:
        values = tuple(map(operator.index, value)) if isinstance(value, Sequence) else (operator.index(value),) * n
    except TypeError:
        values = ()
    if len(values) != n or not all(v >= minimum for v in values):
        raise ValueError(f"{name}={value!r}: give an int >= {minimum}, or {n} of them (one per spatial axis)")
    return values


def as_int(name: str, value: int, minimum: int) -> int:
    """``value`` as an integer, also a NumPy one, that is at least ``minimum``."""
    try:
        number = operator.index(value)
    except TypeError:
        number = minimum - 1
    if number < minimum:
        raise ValueError(f"{name}={value!r} must be an integer >= {minimum}")
    return number


def conv_pads(
    padding: Padding, kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...], transposed: bool
) -> tuple[tuple[int, int], ...]:
    n = len(kernel)
    if isinstance(padding, str):
        if padding == "valid":
            return ((0, 0),) * n
        if padding != "same":
            raise ValueError(f"padding={padding!r} is unknown; give 'same', 'valid' or numbers")
        if transposed or any(s != 1 for s in strides):
            raise ValueError(
                f"padding='same' needs an ordinary convolution of stride 1, got stride={strides}; "
                "give (before, after) pairs instead"
            )
        # As PyTorch does it: the odd one goes behind.
        totals = [d * (k - 1) for d, k in zip(dilations, kernel)]
        return tuple((t // 2, t - t // 2) for t in totals)
    try:
        entries: Sequence[Any] = padding if isinstance(padding, Sequence) else (padding,) * n
        pairs = tuple(tuple(operator.index(q) for q in (e if isinstance(e, Sequence) else (e, e))) for e in entries)
    except TypeError:
        pairs = ()
    if len(pairs) != n or not all(len(p) == 2 and min(p) >= 0 for p in pairs):
        raise ValueError(f"padding={padding!r}: give an int >= 0, or {n} ints or (before, after) pairs, one per axis")
    return pairs  # type: ignore[return-value]


def _axis(i: int, size: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int], mode: str) -> Axis:
    before, after = pads
    extent = dilation * (kernel - 1) + 1
    room = size + before + after - extent
    if room < 0:
        raise ValueError(
            f"input_size is too small on axis {i}: a kernel of extent {extent} does not fit {size} + padding {pads}"
        )
    limit = {"reflect": size - 1, "circular": size}.get(mode, before + after)
    if max(pads) > limit:
        raise ValueError(f"padding={pads} on axis {i} is too large for padding_mode={mode!r} and input size {size}")
    return Axis(size, room // stride + 1, kernel, stride, dilation, before)


def _transposed_axis(
    i: int, size: int, kernel: int, stride: int, dilation: int, pads: tuple[int, int], extra: int
) -> Axis:
    before, after = pads
    if extra >= max(stride, dilation):
        raise ValueError(
            f"output_padding={extra} on axis {i} must be smaller than stride {stride} or dilation {dilation}"
        )
    out = (size - 1) * stride + dilation * (kernel - 1) + 1 - before - after + extra
    if out < 1:
        raise ValueError(f"padding={pads} on axis {i} leaves no output of a transposed convolution of input {size}")
    return Axis(out, size, kernel, stride, dilation, before)
