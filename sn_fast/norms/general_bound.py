"""Bounds of operators that are known by their products: compositions, functions, and users' own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..layers.applying import dense
from ..layers.operators import FunctionOperator, LinearOperator, Product, Scaled, Transposed, leaves_of, parts_of
from ..layers.weighted import in_precision, layer_operator
from .definite import eigenvalue_bound
from .lanczos_bound import lanczos_bound
from .problem import times_power_of_two
from .rounding import product_error
from .symbol import UNIT_ROUNDOFF

if TYPE_CHECKING:
    from collections.abc import Callable

_LARGEST_MATRIX = 1 << 26  # elements of the dense matrix, 512 MiB in float64
_LARGEST_GRAM = 1 << 13  # n of the Gram matrix that is factorised
_AFFORDABLE = 2048  # n up to which "auto" takes the matrix
_BY_EIGENVALUES = 1024


@dataclass(frozen=True)
class BoundInfo:
    """How a bound was found.

    Attributes:
        method: the certificate used, never "auto"; "parts" for a composition that was bounded by its parts' bounds.
        every_size: whether it holds for every input size, or only for the operator's own (and, with zero padding,
            smaller ones).
        confidence: the probability with which it holds; 1 unless the method is "lanczos".
        detail: one line for people.
        certified: whether this is proven for the map itself. False for an operator that is known by its products alone
            (a user's ``LinearOperator``, a function with an operation that is not known to be linear): the bound then
            holds for the linear map that these products compute, with an allowance for their rounding.
    """

    method: str
    every_size: bool
    confidence: float
    detail: str
    certified: bool = True


Found = tuple[float, BoundInfo]


class ProductSearch:
    """The methods that need products alone."""

    def __init__(self, op: LinearOperator, tightness: float, parts_bound: Callable[[LinearOperator], Found]) -> None:
        self.op = op
        self.tightness = tightness
        self._parts_bound = parts_bound
        self._m, self._n = math.prod(op.out_shape), math.prod(op.in_shape)
        self._of_layers = all(layer_operator(leaf) is not None for leaf in leaves_of(op))
        self.certified = all(
            layer_operator(leaf) is not None or (isinstance(leaf, FunctionOperator) and leaf.is_known())
            for leaf in leaves_of(op)
        )

    def auto(self) -> Found:
        """The matrix where that is quick; else the parts' bounds, or Lanczos where a part has products alone."""
        if self._fits(_AFFORDABLE):
            return self.dense()
        return self.by_parts() if self._of_layers else self.lanczos(1e-6, None)

    def refuse(self, method: str) -> Found:
        raise ValueError(
            f"method={method!r} needs the weight of a single layer, and {self.op} is known by its products; "
            "use method='dense', 'lanczos' or 'auto'"
        )

    def dense(self) -> Found:
        if not self._fits(_LARGEST_GRAM):
            raise ValueError(f"method='dense' would need a matrix of {self._m} x {self._n}; use method='lanczos'")
        matrix = dense(in_precision(self.op, torch.float64), torch.float64)
        largest = float(matrix.abs().max())
        if not math.isfinite(largest):
            raise ValueError(f"the matrix of {self.op} has NaN or infinite elements; its norm is not defined")
        exponent = math.frexp(largest)[1]
        matrix = times_power_of_two(matrix, -exponent)
        n, inner = min(matrix.shape), max(matrix.shape)
        gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        frobenius = float(torch.linalg.vector_norm(matrix)) * (1 + 1e-9)
        by_eigenvalues = n <= _BY_EIGENVALUES
        # Eigenvalues of a large matrix cost a hundred factorisations.
        start = 0.0 if by_eigenvalues else self._estimate(gram)
        slack = 1e-6 if by_eigenvalues else 1e-4
        square = eigenvalue_bound([gram[None]], start=start, slack=slack, find_eigenvalues=by_eigenvalues)
        square += 4 * (inner + 8) * UNIT_ROUNDOFF * frobenius**2
        error = self._error(frobenius, exponent)
        value = math.nextafter(math.sqrt(square), math.inf) + error if square or error else 0.0
        info = BoundInfo("dense", False, 1.0, f"matrix of {self._m} x {self._n}{self._reservation()}", self.certified)
        return _rounded_up_product(value, exponent), info

    def lanczos(self, delta: float, generator: torch.Generator | None) -> Found:
        value, steps = lanczos_bound(self.op, self.tightness, delta, generator)
        value *= 1 + self._relative_error()
        detail = f"{steps} Lanczos steps from a random start{self._reservation()}"
        return value, BoundInfo("lanczos", False, 1 - delta, detail, self.certified)

    def by_parts(self) -> Found:
        """|B A| <= |B| |A|, |A + B| <= |A| + |B|."""
        op = self.op
        if not parts_of(op):
            return self._parts_bound(op)
        found = [self._parts_bound(part) for part in parts_of(op)]
        values = [value for value, _ in found]
        if isinstance(op, Product):
            value = values[0] * values[1]
        elif isinstance(op, (Scaled, Transposed)):
            value = values[0] * (abs(op.factor) if isinstance(op, Scaled) else 1.0)
        else:
            value = values[0] + values[1]
        info = BoundInfo(
            "parts",
            all(i.every_size for _, i in found),
            math.prod(i.confidence for _, i in found),
            "the norms of the parts multiplied and added",
            all(i.certified for _, i in found),
        )
        return (math.nextafter(value, math.inf) if value else 0.0), info

    def _fits(self, n: int) -> bool:
        return min(self._m, self._n) <= n and self._m * self._n <= _LARGEST_MATRIX

    def _estimate(self, gram: torch.Tensor) -> float:
        v = torch.ones(len(gram), 1, dtype=gram.dtype, device=gram.device) + gram.abs().sum(dim=1, keepdim=True)
        for _ in range(30):
            v = gram @ v
            v /= torch.linalg.vector_norm(v).clamp_min(torch.finfo(v.dtype).tiny)
        return float(torch.linalg.vector_norm(gram @ v))

    def _error(self, frobenius: float, exponent: int) -> float:
        """A bound of the norm of what rounding has done to the matrix, scaled by 2^-exponent."""
        found = product_error(self.op)
        if found is not None:  # of each column, and so of the matrix by Frobenius' norm
            return math.sqrt(min(self._m, self._n)) * _rounded_up_product(found.error, -exponent)
        return self._relative_error() * frobenius

    def _relative_error(self) -> float:
        """An allowance for the rounding of products in an operator's own precision, relative to their size."""
        if self._of_layers:
            return 1e-9
        lowest = max(
            (torch.finfo(torch.float64 if layer_operator(leaf) is not None else leaf.dtype).eps)
            for leaf in leaves_of(self.op)
        )
        return 64 * lowest * math.sqrt(self._m + self._n)

    def _reservation(self) -> str:
        return "" if self.certified else ", of the linear map that the operator's products compute"


def scaled_up(found: Found, factors: list[float]) -> Found:
    """The bound of c A from that of A."""
    value, info = found
    for c in factors:
        value = math.nextafter(value * abs(c), math.inf) if value else 0.0
    return value, replace(info)


def _rounded_up_product(value: float, exponent: int) -> float:
    """value 2^exponent, or the next larger number."""
    if not value:
        return 0.0
    try:
        return math.nextafter(math.ldexp(value, exponent), math.inf)
    except OverflowError:
        return math.inf
