"""Gram iteration on the kernel itself: a bound for every input size, without frequencies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .symbol import UNIT_ROUNDOFF, Polyphase, split_cells

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_WORK = 2e10  # multiplications, and bytes of the unfolded input, that one product may cost
_BYTES = 1 << 28
_MOST_ITERATIONS = 8  # more gain less than rank^(1/2^10)
_GAIN = 1e-4  # an iteration that gains less is the last
_SUMS = 1e-9  # rounding of the row sums themselves, generously


def gram_iteration_bound(kernel: Tensor, axes: Sequence[Polyphase]) -> tuple[float, int]:
    """(largest row sum of |K_t|)^(1/2^(t+1)), where K_0 = P * P^T and K_{t+1} = K_t * K_t.

    Delattre, Barthelemy, Allauzen, "Spectral norm of convolutional layers with circular and zero paddings", 2024; the
    stride is in P, the polyphase kernel. K_t convolves as A A^T to the power 2^t does on the unbounded lattice.

    Args:
        kernel: (groups, rows, columns, *kernel) in float64.

    Returns:
        The bound, rounding included, and t: as many as work and memory allow.
    """
    cells = split_cells(kernel, axes)
    if cells.shape[-2] > cells.shape[-1]:
        cells = cells.mT
    n_axes = len(axes)
    bounds, done = [], 0
    for group in range(cells.shape[n_axes]):
        p = cells.select(n_axes, group).movedim((-2, -1), (0, 1))  # (n, inner, *cells)
        bound, done = _of_group(p)
        bounds.append(bound)
    return max(bounds), done


def _of_group(p: Tensor) -> tuple[float, int]:
    # Scales and rounding errors of each product; undone backwards at the end.
    gram, scale, error = _convolved(p, p.transpose(0, 1).flip(list(range(2, p.ndim))))
    history = [(scale, error)]
    before = bound = _undone(_row_sum(gram), history)
    while len(history) - 1 < _MOST_ITERATIONS:
        size = gram[0, 0].numel()
        spread = size * size * 2.0 ** (gram.ndim - 2)
        if gram.shape[0] ** 3 * spread > _WORK or gram.shape[0] * spread * 8 > _BYTES:
            break
        gram, scale, error = _convolved(gram, gram)
        history.append((scale, error))
        before, bound = bound, _undone(_row_sum(gram), history)
        if bound > before * (1 - _GAIN):
            break
    return min(before, bound) * (1 + _SUMS), len(history) - 1


def _undone(bound: float, history: list[tuple[float, float]]) -> float:
    """The bound of the norm that follows from one of the last power: lambda_t^2 <= scale (lambda_{t+1} + error)."""
    for scale, error in reversed(history[1:]):
        bound = math.sqrt((bound + error) * scale)
    scale, error = history[0]
    return math.sqrt((bound + error) * scale)


def _convolved(a: Tensor, b: Tensor) -> tuple[Tensor, float, float]:
    """a * b (n, n, *size) over its row sum, that row sum, and a bound of the rounding error of the quotient."""
    n_axes = a.ndim - 2
    # As a correlation over b's flipped taps; b's columns are the batch.
    kernel = a.flip(list(range(2, a.ndim)))
    product = _CONV[n_axes](b.transpose(0, 1), kernel, padding=[s - 1 for s in a.shape[2:]]).transpose(0, 1)
    # Exactly symmetric, K_{-e} = K_e^T, so that the norm of its square is the square of its norm.
    product = (product + product.transpose(0, 1).flip(list(range(2, product.ndim)))) / 2
    scale = _row_sum(product) or 1.0
    terms = a.shape[1] * a[0, 0].numel()
    error = 4 * (terms + 4) * UNIT_ROUNDOFF * _row_sum(a) * _row_sum(b) / scale
    return product / scale, scale, error


def _row_sum(kernel: Tensor) -> float:
    """Largest sum over columns and taps of |kernel|: the l_inf norm of the convolution."""
    return float(kernel.abs().flatten(1).sum(dim=1).max())
