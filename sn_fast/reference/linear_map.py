"""The linear map of a layer, its adjoint, and its derivative with respect to the weight, in plain PyTorch.

Shapes: ``x`` (N, Cin, *input_size), ``y`` (N, Cout, *output_size); for a matrix (N, in) and (N, out). Everything is
differentiable by autograd. Weights are those of the PyTorch layer, also for a transposed convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import is_readable
from .geometry import Axis, Geometry

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_NOTHING: AbstractContextManager[object] = nullcontext()
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Precision in which norms are computed: that of the tensors, but float32 at least."""
    dtype = torch.float32
    for t in tensors:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def matvec(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """A x."""
    with _full_precision(x):
        return _adjoint(x, weight, geometry) if geometry.transposed else _forward(x, weight, geometry)


def rmatvec(y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """A^T y."""
    with _full_precision(y):
        return _forward(y, weight, geometry) if geometry.transposed else _adjoint(y, weight, geometry)


def weight_gradient(u: Tensor, v: Tensor, weight_shape: Sequence[int], geometry: Geometry) -> Tensor:
    """d<u, A v>/dW for ``u`` (Cout, *output_size), ``v`` (Cin, *input_size): the batch-1 weight gradient."""
    if not geometry.axes:
        return torch.outer(u, v)
    x, y = (u, v) if geometry.transposed else (v, u)
    padded, padding = _padded(x[None], geometry)
    weight = y.new_empty(1).expand(list(weight_shape))
    with _full_precision(u):
        return _convolution_backward(y[None], padded, weight, geometry, padding, 1)


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, padding: Sequence[int], which: int
) -> Tensor:
    """The gradient of a convolution in its input (``which`` = 0) or weight (1), of which only the shape is read."""
    axes = geometry.axes
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        [a.stride for a in axes],
        padding,
        [a.dilation for a in axes],
        False,
        [0] * len(axes),
        geometry.groups,
        [which == 0, which == 1, False],
    )[which]


def _full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Norms are computed in the precision of their operands: not in autocast's, nor in cuDNN's TF32."""
    # To leave autocast takes longer than a small product; compiled code must not depend on where it was traced.
    idle = not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type)
    context = _NOTHING if idle else torch.autocast(x.device.type, enabled=False)
    # Compiled code keeps the setting that it finds; so does float64, which has no such mode.
    if x.device.type != "cuda" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return context
    return _without_tf32(context)


@contextmanager
def _without_tf32(context: AbstractContextManager[object]) -> Iterator[None]:
    conv = getattr(torch.backends.cudnn, "conv", None)  # torch 2.9 and newer have a setting for convolutions alone
    holder, name, exact = (
        (torch.backends.cudnn, "allow_tf32", False) if conv is None else (conv, "fp32_precision", "ieee")
    )
    before = getattr(holder, name)
    setattr(holder, name, exact)
    try:
        with context:
            yield
    finally:
        setattr(holder, name, before)


def _forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    if not geometry.axes:
        return x @ weight.T
    padded, padding = _padded(x, geometry)
    axes = geometry.axes
    return _CONV[len(axes)](
        padded,
        weight,
        None,
        [a.stride for a in axes],
        padding,
        [a.dilation for a in axes],
        geometry.groups,
    )


def _adjoint(y: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    if not geometry.axes:
        return y @ weight
    axes = geometry.axes
    native = _pads_natively(geometry)
    if native and is_readable(y, weight):  # the same bits as a transposed convolution, on CPUs in half of the time
        shape = (y.shape[0], weight.shape[1] * geometry.groups, *(a.size for a in axes))
        return _convolution_backward(y, y.new_empty(1).expand(shape), weight, geometry, [a.before for a in axes], 0)
    x = _CONV_TRANSPOSE[len(axes)](
        y,
        weight,
        None,
        [a.stride for a in axes],
        [a.before if native else 0 for a in axes],
        [a.output_padding if native else 0 for a in axes],
        geometry.groups,
        [a.dilation for a in axes],
    )
    return x if native else _unpadded(x, geometry)


def _pads_natively(geometry: Geometry) -> bool:
    """Whether the convolution's own (symmetric, zero) padding does it, without a padded copy of the input."""
    return geometry.mode == "zeros" and all(a.before >= 0 and 0 <= a.output_padding < a.stride for a in geometry.axes)


def _padded(x: Tensor, geometry: Geometry) -> tuple[Tensor, list[int]]:
    """The input as the convolution wants it, and the padding that the convolution itself has to add."""
    axes = geometry.axes
    if _pads_natively(geometry):
        return x, [a.before for a in axes]
    if geometry.mode == "zeros":
        return F.pad(x, _reversed_pads(axes, sign=1)), [0] * len(axes)
    for i, a in enumerate(axes):
        x = x.index_select(2 + i, _positions(a, geometry.mode, x.device))
    return x, [0] * len(axes)


def _unpadded(x: Tensor, geometry: Geometry) -> Tensor:
    """Adjoint of the padding: cut zeros off, add what a wrapped or mirrored border collected to where it came from."""
    axes = geometry.axes
    if geometry.mode == "zeros":
        return F.pad(x, _reversed_pads(axes, sign=-1))
    for i, a in enumerate(axes):
        shape = list(x.shape)
        shape[2 + i] = a.size
        x = x.new_zeros(shape).index_add(2 + i, _positions(a, geometry.mode, x.device), x)
    return x


def _reversed_pads(axes: Sequence[Axis], sign: int) -> list[int]:
    """Pads as F.pad takes them, last axis first."""
    pads = []
    for a in reversed(axes):
        # Cutting more than the input: then only padding is read, and the rest is cut from that.
        pads += [sign * (a.before + min(0, a.size + a.after)), sign * max(a.after, -a.size)]
    return pads


def _positions(axis: Axis, mode: str, device: torch.device) -> Tensor:
    """Input position of every position of the padded axis (see ``Axis.position``)."""
    q = torch.arange(-axis.before, axis.size + axis.after, device=device)
    if mode == "circular":
        return q % axis.size
    if mode == "replicate":
        return q.clamp(0, axis.size - 1)
    return axis.size - 1 - (axis.size - 1 - q.abs()).abs()
