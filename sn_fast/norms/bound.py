"""operator_norm_bound: a number that the norm of an operator provably does not exceed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from ..layers.describe import times
from ..layers.operators import LinearOperator, unscaled
from ..layers.weighted import LayerOperator, layer_operator, per_axis
from ..reference.linear_map import compute_dtype
from .definite import eigenvalue_bound
from .dense import gram_matrix, gram_size
from .estimate import ConvergenceWarning, check_operator, operator_norm, without_autocast
from .general_bound import BoundInfo, Found, ProductSearch, scaled_up
from .grid import Grid, every_size, own_size, padding_norm, padding_norm_at_every_size, riesz_sizes
from .lanczos_bound import lanczos_bound
from .problem import ScaledConvolution
from .rounding import absolute_norm
from .symbol import Symbol

Method = Literal["auto", "dense", "circulant", "fft", "lanczos", "rowsum"]
METHODS: tuple[Method, ...] = get_args(Method)

_LARGEST_GRAM = 1 << 30  # bytes of the matrix that "dense" factorises
_QUICK = 2e9  # multiplications of "dense" below which "auto" tries nothing else
_AFFORDABLE = 2.5e10  # multiplications that "auto" spends on one method, about a second on two cores
_CLOSE = 5e-3  # "auto" looks no further when a bound is within this of what Lanczos reaches from below


@overload
def operator_norm_bound(
    op: LinearOperator,
    *,
    method: Method = "auto",
    grid: int | Sequence[int] | None = None,
    tightness: float = 1.01,
    delta: float = 1e-6,
    generator: torch.Generator | None = None,
    return_info: Literal[False] = False,
) -> Tensor: ...


@overload
def operator_norm_bound(
    op: LinearOperator,
    *,
    method: Method = "auto",
    grid: int | Sequence[int] | None = None,
    tightness: float = 1.01,
    delta: float = 1e-6,
    generator: torch.Generator | None = None,
    return_info: Literal[True],
) -> tuple[Tensor, BoundInfo]: ...


def operator_norm_bound(
    op: LinearOperator,
    *,
    method: Method = "auto",
    grid: int | Sequence[int] | None = None,
    tightness: float = 1.01,
    delta: float = 1e-6,
    generator: torch.Generator | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, BoundInfo]:
    """A certified upper bound of the norm of ``op``: never below it, rounding included (docs/certificates.md).

    For a function, and an operator of your own, see ``BoundInfo.certified``.

    Args:
        op: the operator.
        method:
            "fft": the largest polyphase symbol on a frequency grid, times a Riesz factor: with zero padding for every
            input size; with other padding modes for the operator's own size, times the padding's norm.
            "circulant": the same on the grid of a periodic layer around this one: for this input size (and smaller ones
            with zero padding), without the factor; exact for circular padding where the stride divides the size.
            "dense": the Gram matrix at this input size (at most 1 GiB); the tightest, within 1e-4 as a rule.
            "lanczos": holds with probability 1 - ``delta``.
            "rowsum": sqrt(largest row sum x largest column sum); loose and nearly free.
            "auto": the tightest of the first three that takes a second or so, or else the quickest.
            All but "dense", "lanczos" and "auto" need the operator of a single layer (or a multiple of one).
        grid: frequencies per axis of "fft", an int or one per axis; None: as few as ``tightness`` allows.
        tightness: how far above the supremum "fft" may be by its factor, and "lanczos" above its estimate.
        delta: the probability with which "lanczos" may be wrong.
        generator: of the random start of "lanczos"; None: seeded anew by the system, as the probability demands.
        return_info: also return a ``BoundInfo``: which method was used, and what for.

    Returns:
        The bound, a float64 scalar; or (bound, info).

    Raises:
        ValueError: an unknown method, or one that ``op`` has no weight for; an argument out of range; a weight with NaN
            or infinite elements; products that are visibly not linear or not each other's adjoint; or an operator that
            is too large for "dense". TypeError: ``op`` is not an operator.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(map(repr, METHODS))}")
    check_operator(op)
    if grid is not None and method != "fft":
        raise ValueError(f"grid={grid!r} is an argument of method='fft', not of method={method!r}")
    if not isinstance(tightness, Real) or not 1 < tightness < math.inf:
        raise ValueError(f"tightness={tightness!r} must be a number > 1, e.g. 1.01 for one per cent")
    if not isinstance(delta, Real) or not 0 < delta < 1:
        raise ValueError(f"delta={delta!r} must be a probability between 0 and 1")
    with without_autocast(op):
        value, info = _found(op, method, grid, tightness, delta, generator)
    bound = torch.tensor(value, dtype=torch.float64, device=op.device)
    return (bound, info) if return_info else bound


def tightest_bound(op: LinearOperator, tightness: float = 1.01, lower: float | None = None) -> Found:
    """What "auto" finds; ``lower`` is a norm that some vector attains, where the caller knows one."""
    factors, core = unscaled(op)
    layer = layer_operator(core)
    if layer is None or 0.0 in factors:
        return ProductSearch(op, tightness, tightest_bound).auto()
    known = lower if not factors else None
    return scaled_up(BoundMethods(layer, tightness, lower=known).auto(), factors)


def _found(
    op: LinearOperator,
    method: str,
    grid: int | Sequence[int] | None,
    tightness: float,
    delta: float,
    generator: torch.Generator | None,
) -> Found:
    if method == "auto":
        return tightest_bound(op, tightness)
    factors, core = unscaled(op)
    layer = layer_operator(core)
    if layer is not None and 0.0 not in factors:
        search = BoundMethods(layer, tightness)
        if method == "lanczos":
            return scaled_up(search.lanczos(delta, generator), factors)
        return scaled_up(search.fft(grid) if method == "fft" else getattr(search, method)(), factors)
    by_products = ProductSearch(op, tightness, tightest_bound)
    if method == "lanczos":
        return by_products.lanczos(delta, generator)
    return by_products.dense() if method == "dense" else by_products.refuse(method)


class BoundMethods:
    """The methods, each a function that returns a bound and how it was found.

    ``lower`` is a norm that some vector attains, where the caller knows one. With ``every_size`` the norm of a padding
    other than zeros is the largest that any input size has, so that "fft" and "rowsum" hold for all.
    """

    def __init__(
        self, op: LayerOperator, tightness: float, lower: float | None = None, *, every_size: bool = False
    ) -> None:
        self.op = op
        self.tightness = tightness
        self.problem = ScaledConvolution.of(op)
        self._lower = lower
        of_axis = padding_norm_at_every_size if every_size else padding_norm
        self._padding = math.prod(of_axis(a, self.problem.geometry.mode) for a in self.problem.geometry.axes)
        self._zeros = self.problem.geometry.mode == "zeros"

    def auto(self) -> Found:
        work = self._dense_work()
        if work <= _QUICK or (self._is_matrix() and work < math.inf):
            return self.dense()
        own = own_size(self.problem.geometry, self.problem.at_own_size()[1])
        exact = len(own) == 1 and own[0].factor == 1
        best = self.rowsum()
        if _gram_bytes(self._symbol_shape()) <= _LARGEST_GRAM and not self._is_matrix():
            groups, n = self._symbol_shape()
            points = len(own) * own[0].points
            quick = points <= 4 * self._riesz_grid(None).points or points * groups * n**3 <= _AFFORDABLE
            best = min(best, self.circulant() if exact or quick else self.fft(None), key=_value)
        if exact or work > 8 * _AFFORDABLE:
            return best
        gain = _CLOSE * max(1.0, work / _AFFORDABLE)  # a matrix that takes longer has to gain more
        if best[0] <= self.lower() * (1 + gain):
            return best
        return min(best, self.dense(), key=_value)

    def fft(self, sizes: int | Sequence[int] | None) -> Found:
        grid = self._riesz_grid(sizes)
        value = self._on_grid(Symbol(self.problem.kernel, self.problem.polyphases()), grid) * self._padding
        detail = f"{times(grid.sizes)} frequencies, Riesz factor {grid.factor:.4f}{_padding_detail(self._padding)}"
        return self.problem.unscaled(value), BoundInfo("fft", self._zeros, 1.0, detail)

    def circulant(self) -> Found:
        kernel, polyphases = self.problem.at_own_size()
        symbol = Symbol(kernel, polyphases)
        best = math.inf
        for grid in own_size(self.problem.geometry, polyphases):
            best = min(best, self._on_grid(symbol, grid, give_up=best))
        detail = f"{times(grid.sizes)} frequencies{_padding_detail(grid.factor)}"
        return self.problem.unscaled(best), BoundInfo("circulant", False, 1.0, detail)

    def dense(self) -> Found:
        problem = ScaledConvolution.of(self.op.reduced())
        n = gram_size(problem.kernel, problem.geometry)
        if _gram_bytes((len(problem.kernel), n)) > _LARGEST_GRAM:
            raise ValueError(
                f"method='dense' would factorise {len(problem.kernel)} matrices of {n} x {n}; use method='auto'"
            )
        gram, error = gram_matrix(problem.kernel, problem.geometry)
        # Eigenvalues of a large matrix cost a hundred factorisations, and Lanczos is close.
        by_lanczos = n > 1024
        start = math.ldexp(self.lower(), -problem.exponent) ** 2 if by_lanczos else 0.0
        slack = 1e-4 if by_lanczos else 1e-6
        value = eigenvalue_bound([gram], start=start, slack=slack, find_eigenvalues=not by_lanczos) + error
        info = BoundInfo("dense", self._is_matrix(), 1.0, f"Gram matrix of {n} x {n}")
        return problem.unscaled(_root(value)), info

    def rowsum(self) -> Found:
        value = absolute_norm(self.problem, self._padding)
        info = BoundInfo("rowsum", self._zeros, 1.0, f"row and column sums{_padding_detail(self._padding)}")
        return self.problem.unscaled(value), info

    def lanczos(self, delta: float, generator: torch.Generator | None) -> Found:
        value, steps = lanczos_bound(self.op, self.tightness, delta, generator)
        return value, BoundInfo("lanczos", self._is_matrix(), 1 - delta, f"{steps} Lanczos steps from a random start")

    def lower(self) -> float:
        """A norm that some vector attains."""
        if self._lower is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                # Of the scaled kernel, so that float32 does not overflow.
                kernel = self.problem.kernel.reshape(self.op.weight.shape).to(compute_dtype(self.op.weight))
                norm = operator_norm(LayerOperator(kernel, self.op.geometry), tol=1e-4)
                self._lower = math.ldexp(float(norm), self.problem.exponent)
        return self._lower

    def _on_grid(self, symbol: Symbol, grid: Grid, give_up: float = math.inf) -> float:
        limit = ((give_up / grid.factor) ** 2) if give_up < math.inf else math.inf
        turns = grid.turns().to(self.problem.kernel)
        return _root(eigenvalue_bound(symbol.grams(turns), give_up=limit) + symbol.error) * grid.factor

    def _riesz_grid(self, sizes: int | Sequence[int] | None) -> Grid:
        axes = self.problem.polyphases()
        if sizes is None:
            return every_size(axes, riesz_sizes(axes, self.tightness))
        chosen = per_axis("grid", sizes, len(axes), minimum=1)
        for i, (n, axis) in enumerate(zip(chosen, axes)):
            if n < axis.cells:
                raise ValueError(
                    f"grid={sizes!r} is too coarse on axis {i}: its kernel spans {axis.cells} cells, give at least "
                    f"{axis.cells} frequencies (None chooses them by tightness)"
                )
        return every_size(axes, chosen)

    def _dense_work(self) -> float:
        reduced = self.op.reduced().geometry  # shapes alone: the kernel is the same
        kernel, geometry = self.problem.kernel, reduced if reduced.axes else self.problem.geometry
        n = gram_size(kernel, geometry)
        return math.inf if _gram_bytes((len(kernel), n)) > _LARGEST_GRAM else len(kernel) * n**3 / 3

    def _symbol_shape(self) -> tuple[int, int]:
        groups, rows, columns = self.problem.kernel.shape[:3]
        return groups, min(rows, columns * math.prod(a.phases for a in self.problem.polyphases()))

    def _is_matrix(self) -> bool:
        return not self.op.geometry.axes


def _value(found: Found) -> float:
    return found[0]


def _gram_bytes(shape: tuple[int, int]) -> int:
    groups, n = shape
    return groups * n**2 * 8


def _root(value: float) -> float:
    return math.nextafter(math.sqrt(value), math.inf) if value else 0.0


def _padding_detail(norm: float) -> str:
    return f", norm of the padding {norm:.4f}" if norm != 1 else ""
