"""Frequency grids whose largest symbol bounds the norm of a layer: for every input size, or for its own.

docs/certificates.md has the proofs. Frequencies are given as turns, theta / 2 pi.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.geometry import Axis, Geometry
from .symbol import Polyphase

_SEED = 0


@dataclass(frozen=True)
class Grid:
    """``sizes[i]`` equally spaced frequencies along axis i, moved by ``shifts[i]`` (0 or 1/2) of a spacing.

    ``factor`` times the largest norm of the symbol on this grid bounds the norm.
    """

    sizes: tuple[int, ...]
    shifts: tuple[float, ...]
    steps: tuple[int, ...]  # the frequency at index g is steps * (g + shift) / size turns
    factor: float

    @property
    def points(self) -> int:
        return math.prod(self.sizes)

    def turns(self) -> Tensor:
        """The grid's frequencies (F, axes), one of theta and -theta (the symbol of a real kernel is conjugate there),
        in random order.
        """
        axes = [
            [(step * (2 * g + round(2 * shift))) % (2 * size) for g in range(size)]  # in half spacings: integers
            for size, shift, step in zip(self.sizes, self.shifts, self.steps)
        ]
        points = torch.cartesian_prod(*(torch.tensor(sorted(set(a)), device="cpu") for a in axes)).reshape(
            -1, len(axes)
        )
        whole = torch.tensor([2 * size for size in self.sizes], device="cpu")
        # Each of the pair has a number; keep the smaller of theta and -theta.
        weights = torch.tensor([math.prod(2 * n for n in self.sizes[i + 1 :]) for i in range(len(axes))], device="cpu")
        kept = points[(points @ weights) <= ((-points) % whole) @ weights]
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(_SEED), device="cpu")
        return kept[order].double() / whole


def riesz_sizes(axes: Sequence[Polyphase], tightness: float) -> tuple[int, ...]:
    """The smallest grid with a Riesz factor of at most ``tightness``, shared equally by the axes that need one."""
    busy = sum(a.cells > 1 for a in axes)
    if not busy:
        return (1,) * len(axes)
    reach = 2 * math.acos(tightness ** (-1 / busy))
    return tuple(1 if a.cells == 1 else max(a.cells, math.ceil(math.pi * (a.cells - 1) / reach)) for a in axes)


def every_size(axes: Sequence[Polyphase], sizes: Sequence[int]) -> Grid:
    """A grid that bounds the norm on the unbounded lattice, and so at every input size with zero padding.

    The factor is prod_i 1 / cos(pi (k'_i - 1) / (2 N_i)) (M. Riesz 1914).
    """
    factor = math.prod(1 / math.cos(math.pi * (a.cells - 1) / (2 * n)) for a, n in zip(axes, sizes))
    return Grid(tuple(sizes), (0.0,) * len(axes), (1,) * len(axes), factor)


def own_size(geometry: Geometry, axes: Sequence[Polyphase]) -> list[Grid]:
    """Grids each of which bounds the norm at the geometry's own input size: the smallest is the best bound.

    A layer with zero padding is part of a periodic one that is just large enough, with or without a change of sign at
    each period. With circular padding it is that periodic layer itself, if the stride divides the input size. Other
    borders are an input extended by their padding, whose norm is a factor.
    """
    wholes: list[tuple[int, tuple[float, ...], int]] = []
    factor = 1.0
    for axis, polyphase in zip(geometry.axes, axes):
        periodic = is_periodic(axis, geometry.mode)
        step = axis.dilation // math.gcd(axis.stride, axis.dilation)
        if polyphase.cells == 1:
            wholes.append((1, (0.0,), 1))
        elif periodic:
            wholes.append((axis.size // axis.stride, (0.0,), step))
        else:
            wholes.append((_period(axis, geometry.mode), (0.0, 0.5), step))
        factor *= padding_norm(axis, geometry.mode)
    sizes, shifts, steps = zip(*wholes)
    return [Grid(sizes, chosen, steps, factor) for chosen in itertools.product(*shifts)]


def padding_norm(axis: Axis, mode: str) -> float:
    """Norm of the padding along one axis: the root of how often one input position appears among those read.

    It is no factor with zero padding, and with a circular one that makes the layer periodic on the lattice.
    """
    if mode == "zeros" or is_periodic(axis, mode):
        return 1.0
    read = {
        o * axis.stride + t * axis.dilation - axis.before: axis.position(o, t, mode)
        for o in range(axis.out)
        for t in range(axis.kernel)
    }
    return math.sqrt(max(Counter(read.values()).values()))


def padding_norm_at_every_size(axis: Axis, mode: str) -> float:
    """The largest ``padding_norm`` of this axis at any input size; its last window has to end with the padding."""
    before, after = max(axis.before, 0), max(axis.after, 0)
    if mode == "zeros" or (mode == "circular" and axis.stride == 1 and before + after < axis.extent):
        return 1.0
    if mode == "replicate":
        return math.sqrt(1 + before + after)  # attained by an input of size 1
    return math.sqrt(1 + (before > 0) + (after > 0))


def is_periodic(axis: Axis, mode: str) -> bool:
    """Whether this axis of a layer is all, or a part, of a periodic one on its own circle of ``size`` inputs."""
    return mode == "circular" and axis.size % axis.stride == 0 and axis.out * axis.stride <= axis.size


def _period(axis: Axis, mode: str) -> int:
    """Cells of the smallest circle on which this axis' windows see no input twice and no input that they should not.

    Positions are counted from the first that is read, in units of gcd(stride, dilation): between those lie inputs that
    are never read.
    """
    unit = math.gcd(axis.stride, axis.dilation)
    last = ((axis.out - 1) * axis.stride + axis.dilation * (axis.kernel - 1)) // unit
    if mode == "zeros":
        first_input, last_input = -(-axis.before // unit), (axis.size - 1 + axis.before) // unit
    else:
        first_input, last_input = 0, last
    # The padding before the input may share its places on the circle with the padding after it.
    length = last_input - first_input + 1 + max(first_input, last - last_input, 0)
    return max(axis.out, -(-length // (axis.stride // unit)))
