"""Clipping a layer's singular values: the nearest weight whose layer operator has none above beta."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn

from ..layers.kinds import kind_of
from ..layers.linear import checked_weight, why_not_divisible
from ..layers.weighted import LayerOperator, MatrixOperator, as_int, layer_operator, per_axis
from ..reference.geometry import Axis
from .bound import Method, operator_norm_bound
from .definite import has_eigenvalues_below
from .grid import is_periodic
from .problem import ScaledConvolution, times_power_of_two
from .symbol import Polyphase, split_cells

_CHUNK_BYTES = 1 << 28
_SYMBOLS_BYTES = 1 << 29  # of the symbols on the whole grid; four such arrays are alive
_DENSITIES = (4, 3, 2)  # grid points per cell that the kernel spans, where no input size fixes them
_ROUNDING = 2.0**-24  # first margin for the rounding of the weight's dtype; each further one is 16 times as large


@dataclass(frozen=True)
class ClippedSpectrum:
    """What ``clip_spectrum`` did.

    Attributes:
        bound: certified upper bound of the layer's norm now, at most beta.
        norm_before: the same bound of the weight that was given.
        residual: how far the projections left the largest singular value on the frequency grid above their limit,
            relative; the final scaling has removed it.
        distance: ||W_new - W_old||_F / ||W_old||_F.
        iterations: projections onto both sets; 0 if the weight was not touched.
    """

    bound: float
    norm_before: float
    residual: float
    distance: float
    iterations: int


def clip_spectrum(
    module: nn.Module,
    beta: float,
    *,
    input_size: int | tuple[int, ...] | None = None,
    max_iterations: int = 50,
    tol: float = 1e-3,
) -> ClippedSpectrum:
    """Change a layer's weight, in place, to nearly the nearest one whose operator has no singular value above ``beta``.

    Scaling the weight by beta / sigma shrinks every singular value; this leaves those below ``beta`` nearly as they
    are. For a Linear layer, and a convolution whose windows share no input, the result is exact (one SVD). For other
    convolutions Dykstra's algorithm (Boyle and Dykstra 1986) seeks the nearest point of two convex sets: symbols whose
    singular values are at most ``beta`` at every frequency of a grid (clipped as by Sedghi, Gupta, Long 2019, for
    stride 1 and circular padding), and symbols of kernels of this size. In the end the weight is scaled so that
    ``operator_norm_bound`` proves its norm to be at most ``beta``, rounding of its dtype included; with zero padding
    this costs a few per cent. The weight never moves farther than by scaling alone.

    Args:
        module: Linear, Embedding, Conv1d/2d/3d or ConvTranspose1d/2d/3d, with zero or circular padding. A layer that is
            within ``beta`` already is not touched.
        beta: the largest singular value allowed.
        input_size: spatial size of the input. Circular padding needs it, and is clipped for this size alone; zero
            padding is clipped for every size. Where the stride does not divide a circular layer's size, or a kernel of
            even size adds an output, clipping gains little over scaling.
        max_iterations: of the projections. They may end before ``tol`` is reached: the norm is at most ``beta`` all the
            same, by more scaling.
        tol: the projections stop when no singular value on the grid exceeds ``beta`` by more than this, relative, and
            the squared distance moved is within this of the smallest possible, relative.

    Raises:
        ValueError: beta, tol or max_iterations is not positive; the weight has NaN or infinite elements or is
            parametrized; the padding mode is another; the input size is missing. TypeError: the module has no weight.
    """
    weight = checked_weight(module, "weight")
    beta, tol = _positive("beta", beta), _positive("tol", tol)
    max_iterations = as_int("max_iterations", max_iterations, minimum=1)
    op = _operator(module, weight, input_size)
    with torch.no_grad():
        before = _bound(op)
        if before <= beta:
            return ClippedSpectrum(before, before, residual=0.0, distance=0.0, iterations=0)
        problem = ScaledConvolution.of(op)
        projections = _Projections(problem, beta, before)
        kernel, iterations = projections.nearest(problem.kernel, max_iterations, tol)
        residual = max(0.0, projections.largest(kernel) / projections.radius - 1)
        clipped, bound = _scaled_below(beta, kernel, op, problem)
        distance = _distance(clipped, problem)
        if distance > 1 - beta / before:
            scaled, scaled_bound = _scaled_below(beta, problem.kernel, op, problem)
            if _distance(scaled, problem) < distance:
                clipped, bound, distance = scaled, scaled_bound, _distance(scaled, problem)
        weight.copy_(clipped)
        return ClippedSpectrum(bound, before, residual, distance, iterations)


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number > 0")
    return float(value)


def _operator(module: nn.Module, weight: Tensor, input_size: int | tuple[int, ...] | None) -> LayerOperator:
    reason = _why_not(module, weight, input_size)
    if reason is not None:
        raise ValueError(f"clip_spectrum changes the weight of a layer whose map is that of its weight: {reason}")
    if weight.ndim == 2:
        return MatrixOperator(weight.detach())  # also of an Embedding: its transpose has the same singular values
    mode = getattr(module, "padding_mode", "zeros")
    if mode not in ("zeros", "circular"):
        raise ValueError(
            f"padding_mode={mode!r}: clip_spectrum works with 'zeros' and 'circular', where single frequencies can be "
            "clipped; for this layer use spectral_norm, which scales the weight"
        )
    if input_size is None and mode == "circular":
        raise ValueError(
            "input_size is needed for padding_mode='circular', where the norm depends on it: give the spatial size of "
            "the layer's input, e.g. input_size=(32, 32)"
        )
    kind = kind_of(module)
    if kind is None:
        return MatrixOperator(weight.detach())  # raises
    if input_size is None and kind.nominal_size is not None:
        input_size = kind.nominal_size(module)  # with zero padding the bound is the same for all
    op = layer_operator(kind.operator(module, weight.detach(), input_size))
    if op is None or op.weight.shape != weight.shape:
        raise ValueError(f"clip_spectrum: the operator of {type(module).__name__} is not that of its weight")
    return op


def _why_not(module: nn.Module, weight: Tensor, input_size: int | tuple[int, ...] | None) -> str | None:
    kind = kind_of(module)
    if kind is None:
        return None
    if input_size is None and kind.axes and kind.nominal_size is not None:
        input_size = kind.nominal_size(module)
    size = None if input_size is None or not kind.axes else per_axis("input_size", input_size, kind.axes, minimum=1)
    return why_not_divisible(module, weight, size)


def _bound(op: LayerOperator) -> float:
    mode = op.geometry.mode
    method: Method = "dense" if not op.geometry.axes else "fft" if mode == "zeros" else "auto"
    return float(operator_norm_bound(op, method=method))


def _scaled_below(beta: float, kernel: Tensor, op: LayerOperator, problem: ScaledConvolution) -> tuple[Tensor, float]:
    """The kernel as a weight of the operator's shape and dtype, scaled down as far as beta demands, and its bound."""
    factor, margin = 1.0, _ROUNDING
    while True:
        weight = times_power_of_two(kernel * factor, problem.exponent).reshape(op.weight.shape).to(op.weight.dtype)
        bound = _bound(LayerOperator(weight, op.geometry))
        if bound <= beta:
            return weight, bound
        factor *= beta / bound * (1 - margin)
        margin = min(1.0, 16 * margin)


def _distance(weight: Tensor, problem: ScaledConvolution) -> float:
    moved = times_power_of_two(weight.double(), -problem.exponent).reshape(problem.kernel.shape) - problem.kernel
    return float(moved.norm() / problem.kernel.norm())


class _Projections:
    """The two sets between which the kernel is sought, and the map K from kernels to symbols.

    The nearest kernel x to w with every symbol within the radius r maximises the dual
    <p, K w> - |K^T p|^2 / 2 - r |p|_* at x = w - K^T p, where |p|_* is the sum of singular values, and <,> and |p|_*
    are means over frequencies. Where the grid is at least as fine as the kernel, K^T K = I, and Dykstra's algorithm is
    gradient ascent of the dual by proximal steps of length 1, its correction being p. The ascent is accelerated (Beck
    and Teboulle 2009) and restarts where the dual falls (O'Donoghue and Candès 2015): its error falls as 1 / n^2
    instead of 1 / n.

    Attributes:
        radius: the largest singular value allowed of a symbol.
        sizes: frequencies per axis.
    """

    def __init__(self, problem: ScaledConvolution, beta: float, norm: float) -> None:
        self._axes = problem.polyphases()
        geometry, shape = problem.geometry, problem.kernel.shape
        periods = [_period(axis) if geometry.mode == "circular" else None for axis in geometry.axes]
        elements = math.prod(shape[:3]) * math.prod(a.phases for a in self._axes)
        self.sizes = _grid_sizes(self._axes, periods, elements)
        self._shape = shape
        # A coarse circular grid adds up taps that lie a period apart.
        self._places = [torch.arange(a.cells, device=problem.kernel.device) % n for a, n in zip(self._axes, self.sizes)]
        self._step = 1 / math.prod(-(-a.cells // n) for a, n in zip(self._axes, self.sizes))
        self._dims = tuple(range(len(self.sizes)))
        self._single = math.prod(self.sizes) == 1
        self.radius = max(times_power_of_two(beta, -problem.exponent), sys.float_info.min)
        if geometry.mode == "circular" and None in periods:
            # The layer is not diagonal in frequency; its norm is in some proportion to that of its symbol.
            self.radius *= self.largest(problem.kernel) / times_power_of_two(norm, -problem.exponent)

    def nearest(self, kernel: Tensor, max_iterations: int, tol: float) -> tuple[Tensor, int]:
        """The kernel after the last projection onto the support, and the iterations; see ``clip_spectrum``."""
        dual = ahead = torch.zeros_like(self._symbols(kernel))
        x_ahead, best, t = kernel, -math.inf, 1.0
        for iteration in range(1, max_iterations + 1):  # noqa: B007 - how many there were is the result
            raised = self._symbols(x_ahead).mul_(self._step).add_(ahead)
            nuclear_norm = self._keep_excess(raised)
            change = self._adjoint(raised)
            x = kernel - change
            half_square = float(change.square().sum()) / 2
            gap = self.radius * nuclear_norm - float((change * x).sum())
            if abs(gap) <= tol * half_square and self._is_within(x, self.radius * (1 + tol)):
                break
            value = float((change * kernel).sum()) - half_square - self.radius * nuclear_norm
            t, t_before = (1 + math.sqrt(1 + 4 * t * t)) / 2, t
            if value < best:
                t = t_before = 1.0
            ahead = torch.lerp(dual, raised, 1 + (t_before - 1) / t)
            x_ahead = kernel - self._adjoint(ahead)
            dual, best = raised, value
        return x, iteration

    def largest(self, kernel: Tensor) -> float:
        """The largest singular value of the kernel's symbol on the grid."""
        matrices = self._symbols(kernel).flatten(0, -3)
        if self._single:
            return float(torch.linalg.svdvals(matrices).max())
        return math.sqrt(max(0.0, *(float(torch.linalg.eigvalsh(_gram(z))[:, -1].max()) for z in _chunks(matrices))))

    def _symbols(self, kernel: Tensor) -> Tensor:
        """K: (groups, rows, columns, *kernel) -> (*half of the grid, groups, rows, phases * columns)."""
        cells = split_cells(kernel, self._axes)
        for dim, (places, n) in enumerate(zip(self._places, self.sizes)):
            shape = [n if d == dim else s for d, s in enumerate(cells.shape)]
            cells = cells.new_zeros(shape).index_add_(dim, places, cells)
        return cells if self._single else torch.fft.rfftn(cells, dim=self._dims).contiguous()

    def _adjoint(self, symbols: Tensor) -> Tensor:
        """K^T, for the mean over frequencies as the symbols' inner product."""
        cells = symbols if self._single else torch.fft.irfftn(symbols, s=self.sizes, dim=self._dims)
        for dim, places in enumerate(self._places):
            cells = cells.index_select(dim, places)
        return _join_cells(cells, self._axes, self._shape)

    def _keep_excess(self, symbols: Tensor) -> float:
        """Replace singular values s of the symbols by max(0, s - step radius), and return the sum (see the class).

        What goes is the projection onto the symbols within that radius.
        """
        limit = self._step * self.radius
        excess = _excess_by_svd if self._single else _excess_by_eigenvectors
        sums = torch.cat([excess(z, limit) for z in _chunks(symbols.flatten(0, -3))])
        sums = sums.reshape(*symbols.shape[:-2]).sum(dim=-1)  # over groups
        if not self._single:
            n = self.sizes[-1]  # a real kernel: the other half of the last axis is the conjugate
            sums[..., 1 : (n + 1) // 2] *= 2
        return float(sums.sum()) / math.prod(self.sizes)

    def _is_within(self, kernel: Tensor, limit: float) -> bool:
        if self._single:
            return self.largest(kernel) <= limit
        return not any(
            bool((~has_eigenvalues_below(_gram(z), limit**2)).any())
            for z in _chunks(self._symbols(kernel).flatten(0, -3))
        )


def _period(axis: Axis) -> int | None:
    """Frequencies of an axis with circular padding, where the layer is part of one that is diagonal in frequency."""
    if not is_periodic(axis, "circular"):
        return None
    cells = axis.size // axis.stride
    # Where the dilation has a factor in common with the period, frequencies repeat.
    return cells // math.gcd(cells, axis.dilation // math.gcd(axis.stride, axis.dilation))


def _grid_sizes(axes: tuple[Polyphase, ...], periods: list[int | None], elements: int) -> tuple[int, ...]:
    for density in _DENSITIES:
        sizes = tuple(
            1 if axis.cells == 1 else period or density * (axis.cells + 1) for axis, period in zip(axes, periods)
        )
        if math.prod(sizes) * elements * 8 <= _SYMBOLS_BYTES:
            break
    return sizes


def _join_cells(cells: Tensor, axes: tuple[Polyphase, ...], shape: torch.Size) -> Tensor:
    """Inverse of ``split_cells``: the kernel, of this shape."""
    n = len(axes)
    cells = cells.unflatten(-1, (*(a.phases for a in axes), shape[2]))
    # (*cells, groups, rows, *phases, columns)
    order = [n, n + 1, 2 * n + 2]
    for i in range(n):
        order += [i, n + 2 + i]
    kernel = cells.permute(order).reshape(*shape[:3], *(a.cells * a.phases for a in axes))
    for dim, k in enumerate(shape[3:], start=3):
        kernel = kernel.narrow(dim, 0, k)
    return kernel


def _chunks(matrices: Tensor) -> tuple[Tensor, ...]:
    rows, columns = matrices.shape[-2:]
    bytes_each = 16 * (3 * rows * columns + 4 * min(rows, columns) ** 2)
    return matrices.split(max(1, _CHUNK_BYTES // bytes_each))


def _gram(z: Tensor) -> Tensor:
    return z @ z.mH if z.shape[-2] <= z.shape[-1] else z.mH @ z


def _excess_by_svd(z: Tensor, limit: float) -> Tensor:
    u, s, vh = torch.linalg.svd(z, full_matrices=False)
    s = (s - limit).clamp_min_(0)
    z.copy_((u * s[..., None, :]) @ vh)
    return s.sum(dim=-1)


def _excess_by_eigenvectors(z: Tensor, limit: float) -> Tensor:
    """As by the SVD, at half its time; singular values that matter are near ``limit`` or above, where squares do."""
    gram = _gram(z)
    over = ~has_eigenvalues_below(gram, limit**2)
    squares, vectors = torch.linalg.eigh(gram[over])
    s = squares.clamp_min_(0).sqrt_()
    kept = (1 - limit / s).clamp_min_(0)
    projector = (vectors * kept[..., None, :]) @ vectors.mH
    excess = torch.zeros_like(z)
    excess[over] = projector @ z[over] if z.shape[-2] <= z.shape[-1] else z[over] @ projector
    z.copy_(excess)
    return torch.zeros(len(z), dtype=s.dtype, device=s.device).masked_scatter_(over, (s * kept).sum(dim=-1))
