"""operator_norm_interval: the norm of an operator between two certified numbers."""

from __future__ import annotations

import math
import warnings
from typing import Literal, overload

import torch
from torch import Tensor

from ..layers.applying import apply
from ..layers.operators import LinearOperator, unscaled
from ..layers.weighted import LayerOperator, in_precision, layer_operator
from .bound import tightest_bound
from .estimate import ConvergenceWarning, check_operator, check_tolerance, operator_norm, without_autocast
from .general_bound import BoundInfo
from .rounding import product_error
from .symbol import UNIT_ROUNDOFF


@overload
def operator_norm_interval(
    op: LinearOperator,
    *,
    tol: float = 1e-5,
    start: tuple[Tensor, Tensor] | None = None,
    return_info: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def operator_norm_interval(
    op: LinearOperator,
    *,
    tol: float = 1e-5,
    start: tuple[Tensor, Tensor] | None = None,
    return_info: Literal[True],
) -> tuple[Tensor, Tensor, BoundInfo]: ...


def operator_norm_interval(
    op: LinearOperator,
    *,
    tol: float = 1e-5,
    start: tuple[Tensor, Tensor] | None = None,
    return_info: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, BoundInfo]:
    """A certified interval (lower, upper) that contains the norm of ``op`` at its input size.

    The lower end is |A v| / |v| for the vector v that Lanczos ends with, in float64 and rounded down; the upper end is
    ``operator_norm_bound(op, method="auto")``.

    Args:
        op: the operator.
        tol: Lanczos stops when |A^T u - sigma v| <= tol * sigma. It moves the lower end alone;
            where it is not reached the interval is wider, without a warning.
        start: singular vectors (u, v) to start from, e.g. those of a similar weight; shapes out_shape and in_shape.
        return_info: also return the ``BoundInfo`` of the upper end; it says whether the interval is proven for the map
            itself (``certified``), as it is for layers and their compositions, or for the products as computed.

    Returns:
        Two float64 scalars, lower <= norm <= upper; and the info if wanted.

    Raises:
        ValueError, TypeError: as ``operator_norm`` does.
    """
    check_operator(op)
    check_tolerance(tol)
    with without_autocast(op):
        with warnings.catch_warnings():
            # The upper end shows how far the lower one is off.
            warnings.simplefilter("ignore", ConvergenceWarning)
            _, _, v = operator_norm(op, tol=tol, start=start, return_vectors=True)
        lower = attained_norm(op, v)
        upper, info = tightest_bound(op, lower=lower)
    least, most = (torch.tensor(end, dtype=torch.float64, device=op.device) for end in (lower, upper))
    return (least, most, info) if return_info else (least, most)


def attained_norm(op: LinearOperator, v: Tensor) -> float:
    """|A v| / |v| in float64, minus all that rounding can have added; 0 where v is."""
    factors, core = unscaled(op)
    layer = layer_operator(core)
    if layer is None:
        return _attained_by_products(op, v)
    value = _attained_by_layer(layer, v)
    for c in factors:
        value = math.nextafter(value * abs(c), 0.0)
    return value


def _attained_by_layer(op: LayerOperator, v: Tensor) -> float:
    largest = op.weight.detach().abs().max().double()
    if not bool(largest > 0):
        return 0.0
    weight = op.weight.detach().double() / largest
    v = v.double()
    image = LayerOperator(weight, op.geometry).matvec(v)
    # An element of A v is a sum of at most this many products: |fl(A v) - A v| <= gamma |A| |v|, elementwise.
    terms = math.prod(weight.shape) // min(weight.shape[:2]) + 8
    absolute = LayerOperator(weight.abs(), op.geometry).matvec(v.abs())
    lost = 4 * terms * UNIT_ROUNDOFF * float(torch.linalg.vector_norm(absolute))
    length = float(torch.linalg.vector_norm(v))
    sums = 1 - 4 * (v.numel() + image.numel() + 8) * UNIT_ROUNDOFF
    value = (float(torch.linalg.vector_norm(image)) * sums - lost) / length if length else 0.0
    return max(0.0, math.nextafter(value * sums * float(largest), 0.0))


def _attained_by_products(op: LinearOperator, v: Tensor) -> float:
    image = apply(in_precision(op, torch.float64), v.double()[None])
    value, length = (float(torch.linalg.vector_norm(t.double())) for t in (image, v))
    if not length:
        return 0.0
    found = product_error(op)
    # Of products in an operator's own precision the rounding is not known: an allowance.
    lost = found.error if found is not None else 64 * torch.finfo(op.dtype).eps * value / length
    sums = 1 - 4 * (v.numel() + image.numel() + 8) * UNIT_ROUNDOFF
    return max(0.0, math.nextafter((value * sums / length - lost) * sums, 0.0))
