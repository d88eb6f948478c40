"""The polyphase symbol of a convolution: small matrices D(theta), one per frequency, whose norms bound the layer's.

On an unbounded lattice a convolution of stride s and dilation d is, after division by gcd(s, d) (the other inputs are
never read), a stride-1 convolution whose input channels are the s positions of each cell ("phases"): tap t = t0 + s j
belongs to phase t0, at cell j, and

    D(theta)[row, (t0, column)] = sum_j W[row, column, t0 + s j] exp(i <theta, j>)

has the singular values of the layer at that frequency, up to the reordering theta -> d theta. docs/certificates.md has
the proofs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.geometry import Axis

UNIT_ROUNDOFF = 2.0**-53
_COEFFICIENT_BYTES = 1 << 29
_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class Polyphase:
    """One axis of the symbol: positions per cell, and cells that one output spans (k' in the formulas)."""

    phases: int
    cells: int

    @classmethod
    def of(cls, axis: Axis) -> Polyphase:
        phases = axis.stride // math.gcd(axis.stride, axis.dilation)
        return cls(phases, -(-axis.kernel // phases))


class Symbol:
    """D(theta) of a kernel (groups, rows, columns, *kernel), and the Gram matrices of its smaller side.

    Attributes:
        groups, n: shape of one Gram matrix, (groups, n, n).
        error: what rounding can add to the norm of any Gram matrix.
    """

    def __init__(self, kernel: Tensor, axes: Sequence[Polyphase]) -> None:
        cells = split_cells(kernel, axes)  # (*cells, groups, rows, phases * columns)
        if cells.shape[-2] > cells.shape[-1]:
            cells = cells.mT  # D^T has the singular values of D
        self.shape = tuple(a.cells for a in axes)
        self.groups, self.n, inner = cells.shape[-3:]
        cells = cells.reshape(-1, self.groups, self.n, inner).contiguous()
        offsets = 1 + math.prod(2 * c - 1 for c in self.shape) // 2  # half of the differences of two cells, and zero
        # G(theta) = sum over differences of K exp(i theta difference): the products K are computed once for all theta.
        # They cost memory, which very large kernels do not have; those form D(theta) and its square.
        self._by_products = offsets * self.groups * self.n**2 * 8 <= _COEFFICIENT_BYTES
        if self._by_products:
            positions, self._coefficients = _products(cells, self.shape)
        else:
            positions, self._coefficients = _box([(0, s) for s in self.shape]), cells
        self._positions = positions.to(cells)
        frobenius = torch.linalg.vector_norm(cells, dim=(-2, -1)).sum(dim=0).max()
        # Roundings of one element: of the products' sums, of the sum over differences, and of exp(i <theta, j>), whose
        # argument is off by at most 2 pi * 3 units per cell and axis.
        roundings = inner * cells.shape[0] + offsets + 20 * sum(self.shape) + 32
        self.error = 4 * roundings * UNIT_ROUNDOFF * float(frobenius) ** 2

    def grams(self, turns: Tensor) -> Iterator[Tensor]:
        """G(theta) = D D^H in chunks (chunk, groups, n, n), complex128, for ``turns`` = theta / 2 pi, (F, axes)."""
        per_frequency = 5 * 16 * self.groups * self.n**2
        for chunk in turns.split(max(1, _CHUNK_BYTES // per_frequency)):
            # Reduced to one turn before the multiplication by 2 pi, so that the argument's rounding stays small.
            angle = 2 * math.pi * torch.frac(chunk @ self._positions.T)
            flat = self._coefficients.flatten(1)
            real, imaginary = torch.cos(angle) @ flat, torch.sin(angle) @ flat
            shape = (len(chunk), *self._coefficients.shape[1:])
            half = torch.complex(real.reshape(shape), imaginary.reshape(shape))
            del real, imaginary
            yield half + half.mH if self._by_products else half @ half.mH


def split_cells(kernel: Tensor, axes: Sequence[Polyphase]) -> Tensor:
    """(groups, rows, columns, *kernel) -> (*cells, groups, rows, phases * columns), zero-padded to whole cells."""
    pads = [p for a, k in zip(reversed(axes), reversed(kernel.shape[3:])) for p in (0, a.phases * a.cells - k)]
    kernel = torch.nn.functional.pad(kernel, pads)
    kernel = kernel.reshape(*kernel.shape[:3], *(size for a in axes for size in (a.cells, a.phases)))
    cells, phases = range(3, kernel.ndim, 2), range(4, kernel.ndim, 2)
    return kernel.permute(*cells, 0, 1, *phases, 2).flatten(len(axes) + 2)


def _products(cells: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Differences e >= 0 of two cells, and K_e = sum_j P_{j+e} P_j^T; K_0 is halved, so that G = sum + (sum)^H."""
    grid = cells.reshape(*shape, *cells.shape[1:])
    differences = _box([(1 - s, s) for s in shape])
    # Of e and -e, the one whose first nonzero entry is positive; and zero.
    differences = differences[len(differences) // 2 :]
    products = []
    for e in differences.tolist():
        ahead = tuple(slice(max(x, 0), s + min(x, 0)) for x, s in zip(e, shape))
        behind = tuple(slice(max(-x, 0), s - max(x, 0)) for x, s in zip(e, shape))
        total = cells.new_zeros(cells.shape[1], cells.shape[2], cells.shape[2])
        for a, b in zip(grid[ahead].flatten(0, len(shape) - 1), grid[behind].flatten(0, len(shape) - 1)):
            total.baddbmm_(a, b.mT)
        products.append(total if any(e) else total / 2)
    return differences, torch.stack(products)


def _box(ranges: Sequence[tuple[int, int]]) -> Tensor:
    """All integer points of a box, (points, axes), in lexicographic order."""
    return torch.cartesian_prod(*(torch.arange(low, high, device="cpu") for low, high in ranges)).reshape(
        -1, len(ranges)
    )
