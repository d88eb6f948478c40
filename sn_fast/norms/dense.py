"""The Gram matrix of a layer at its own input size, assembled from products of the kernel's taps."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..reference.geometry import Axis, Geometry
from .grid import padding_norm
from .symbol import UNIT_ROUNDOFF


def gram_size(kernel: Tensor, geometry: Geometry) -> int:
    """n of ``gram_matrix``."""
    return min(_sides(kernel, geometry))


def gram_matrix(kernel: Tensor, geometry: Geometry) -> tuple[Tensor, float]:
    """A A^T or A^T A, the smaller, and what rounding can add to its norm.

    With S_t the places (outputs x inputs) at which tap t reads, a product over axes, A = sum_t S_t (x) W_t, and so
    A A^T = sum_{t, u} (S_t S_u^T) (x) (W_t W_u^T).

    Args:
        kernel: (groups, rows, columns, *kernel) in float64; ``geometry`` is that of the convolution proper.

    Returns:
        (groups, n, n), and the error.
    """
    rows, columns = _sides(kernel, geometry)
    taps = kernel.flatten(3).movedim(3, 0)  # (taps, groups, rows, columns)
    reads = [_reads(axis, geometry.mode) for axis in geometry.axes]
    if rows > columns:
        taps, reads = taps.mT, [s.mT for s in reads]
    width = taps.shape[2]
    sizes = [s.shape[1] for s in reads]
    places = math.prod(sizes)
    couplings = [{(i, j): (s[i] @ s[j].T).to_sparse() for i in range(len(s)) for j in range(len(s))} for s in reads]
    gram = taps.new_zeros(taps.shape[1], places, width, places, width)
    tap_indices = list(itertools.product(*(range(len(s)) for s in reads)))
    for (t, at), (u, other) in itertools.product(enumerate(tap_indices), repeat=2):
        here, there, counts = _kron([c[pair] for c, pair in zip(couplings, zip(at, other))], sizes)
        if len(here):
            product = counts.to(gram)[:, None, None, None] * (taps[t] @ taps[u].mT)
            gram[:, here.to(gram.device), :, there.to(gram.device)] += product
    # Error: the roundings of one element times a bound of | |A| |A|^T |.
    absolute = float(torch.linalg.vector_norm(taps, dim=(-2, -1)).sum(dim=0).max())
    absolute *= math.prod(padding_norm(axis, geometry.mode) for axis in geometry.axes)
    roundings = len(taps) ** 2 + taps.shape[3] + 8
    return gram.reshape(len(gram), places * width, -1), 4 * roundings * UNIT_ROUNDOFF * absolute**2


def _kron(factors: list[Tensor], sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, columns and values of the nonzeros of the Kronecker product of sparse matrices (size, size)."""
    rows = columns = torch.zeros(1, dtype=torch.int64, device="cpu")
    values = torch.ones(1, dtype=torch.float64, device="cpu")
    for factor, size in zip(factors, sizes):
        row, column = factor.indices()
        rows = (rows[:, None] * size + row).flatten()
        columns = (columns[:, None] * size + column).flatten()
        values = (values[:, None] * factor.values()).flatten()
    return rows, columns, values


def _sides(kernel: Tensor, geometry: Geometry) -> tuple[int, int]:
    outputs, inputs = math.prod(a.out for a in geometry.axes), math.prod(a.size for a in geometry.axes)
    return kernel.shape[1] * outputs, kernel.shape[2] * inputs


def _reads(axis: Axis, mode: str) -> Tensor:
    """S (kernel, out, size): 1 where tap t of output o reads input position i."""
    reads = torch.zeros(axis.kernel, axis.out, axis.size, dtype=torch.float32, device="cpu")  # exact counts below 2^24
    for t, o in itertools.product(range(axis.kernel), range(axis.out)):
        position = axis.position(o, t, mode)
        if position is not None:
            reads[t, o, position] = 1
    return reads
