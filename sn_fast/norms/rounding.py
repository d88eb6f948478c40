"""What rounding can do to the products of operators that are made of weights."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..layers.operators import LinearOperator, Product, Scaled, Sum, parts_of
from ..layers.weighted import LayerOperator, layer_operator
from .grid import padding_norm
from .problem import ScaledConvolution
from .symbol import UNIT_ROUNDOFF, split_cells

_SUMS = 1e-9  # rounding of row and column sums, generously


class ProductError(NamedTuple):
    """Of an operator A with float64 weights: a bound of | |A| |, and e such that |fl(A x) - A x| <= e |x|."""

    norm: float
    error: float


def absolute_norm(problem: ScaledConvolution, padding: float) -> float:
    """A bound of the norm of the operator with the kernel's absolute values: sqrt(largest row sum x column sum)."""
    cells = split_cells(problem.kernel.abs(), problem.polyphases())
    cells = cells.flatten(0, len(problem.geometry.axes) - 1).sum(dim=0)  # (groups, rows, phases * columns)
    product = cells.sum(dim=2).amax(dim=1) * cells.sum(dim=1).amax(dim=1)
    largest = float(product.max())
    return math.nextafter(math.sqrt(largest), math.inf) * (1 + _SUMS) * padding if largest else 0.0


def product_error(op: LinearOperator) -> ProductError | None:
    """For products in float64, in norm; None where an operator is known by its products alone."""
    layer = layer_operator(op)
    if layer is not None:
        return _of_layer(layer)
    found = [product_error(part) for part in parts_of(op)]
    if not found or any(f is None for f in found):
        return None
    parts = [f for f in found if f is not None]
    if isinstance(op, Product):
        (b, eb), (a, ea) = parts
        return ProductError(b * a, b * ea + eb * (a + ea))
    if isinstance(op, Sum):
        (a, ea), (b, eb) = parts
        return ProductError(a + b, ea + eb + 2 * UNIT_ROUNDOFF * (a + b + ea + eb))
    (a, ea) = parts[0]
    factor = abs(op.factor) if isinstance(op, Scaled) else 1.0
    return ProductError(factor * a, factor * (ea + 2 * UNIT_ROUNDOFF * (a + ea)))


def _of_layer(op: LayerOperator) -> ProductError:
    problem = ScaledConvolution.of(op)
    padding = math.prod(padding_norm(axis, problem.geometry.mode) for axis in problem.geometry.axes)
    norm = problem.unscaled(absolute_norm(problem, padding))
    # An element of A x is a sum of at most this many products, and |fl(A x) - A x| <= gamma |A| |x| elementwise.
    terms = op.weight.numel() // min(op.weight.shape[:2]) + 8
    repeats = max(2, round(padding**2))  # an adjoint adds what a padding repeated
    return ProductError(norm, 4 * (terms + repeats) * UNIT_ROUNDOFF * norm)
