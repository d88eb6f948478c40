"""Geometry of a convolution as data: a few integers per axis, from which every index follows.

Padding mode, stride, dilation, asymmetry and transposition act on each axis on its own, so one axis is a table
``position[o, t]``: the input position that tap ``t`` of output ``o`` reads, or none. The operators, their adjoints, the
exact reductions and (encoded as integers) the kernels all read this one description.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")
_AXIS_FIELDS = 6
_HEADER_FIELDS = 4


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution: output ``o``, tap ``t`` looks at ``o * stride + t * dilation - before``."""

    size: int
    out: int
    kernel: int
    stride: int
    dilation: int
    before: int

    @property
    def extent(self) -> int:
        """Width of the window of one output, in input positions."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def after(self) -> int:
        """Padding on the far side that is really read; negative where the last input positions are never read."""
        return (self.out - 1) * self.stride + self.extent - self.size - self.before

    @property
    def output_padding(self) -> int:
        """Rows of a symmetrically padded input that no window reaches; the transposed convolution has to add them."""
        return self.before - self.after

    def position(self, o: int, t: int, mode: str) -> int | None:
        """Input position that tap ``t`` of output ``o`` reads; None where it reads a padded zero."""
        q = o * self.stride + t * self.dilation - self.before
        if 0 <= q < self.size:
            return q
        if mode == "zeros":
            return None
        if mode == "circular":
            return q % self.size
        if mode == "replicate":
            return min(max(q, 0), self.size - 1)
        return self.size - 1 - abs(self.size - 1 - abs(q))

    def window(self, o: int, mode: str) -> list[int | None]:
        """The input positions that output ``o`` reads, one per tap."""
        return [self.position(o, t, mode) for t in range(self.kernel)]

    def whole_window(self, mode: str) -> int | None:
        """An output that sees every tap, if this axis is a set of windows that share no input; else None.

        Then the operator falls apart along this axis into one block per output; each block is that of a whole window
        with some inputs missing, so the norm is the whole window's.
        """
        if self.out > 1 and self.extent > self.stride:
            return None
        whole: int | None = None
        read: set[int] = set()
        for o in range(self.out):
            positions = [p for p in self.window(o, mode) if p is not None]
            if len(set(positions)) < len(positions) or not read.isdisjoint(positions):
                return None
            read.update(positions)
            if whole is None and len(positions) == self.kernel:
                whole = o
        return whole

    def collapsed(self) -> Axis:
        """The same axis reduced to one whole window."""
        return Axis(size=self.kernel, out=1, kernel=self.kernel, stride=1, dilation=1, before=0)


@dataclass(frozen=True)
class Geometry:
    """Geometry of a linear layer: a convolution over ``axes``, or a plain matrix when there are none.

    A transposed convolution is described by the convolution whose adjoint it is: ``axes`` are that convolution's.
    """

    axes: tuple[Axis, ...] = ()
    groups: int = 1
    transposed: bool = False
    mode: str = "zeros"

    @property
    def input_size(self) -> tuple[int, ...]:
        """Spatial size of the layer's input."""
        return tuple(a.out if self.transposed else a.size for a in self.axes)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Spatial size of the layer's output."""
        return tuple(a.size if self.transposed else a.out for a in self.axes)

    def in_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the layer's input without batch, (Cin, *input_size)."""
        channels = weight_shape[0] if self.transposed else weight_shape[1] * self.groups
        return (channels, *self.input_size)

    def out_shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the layer's output without batch, (Cout, *output_size)."""
        channels = weight_shape[1] * self.groups if self.transposed else weight_shape[0]
        return (channels, *self.output_size)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 - frozen and hashable; one entry per distinct geometry
    def whole_windows(self) -> tuple[int | None, ...]:
        """Per axis, the output that stands for all where the axis collapses exactly; None where it does not."""
        return tuple(a.whole_window(self.mode) for a in self.axes)

    def reduced(self) -> Geometry:
        """The smallest geometry with the same norm: every axis whose windows share no input becomes one window."""
        windows = self.whole_windows()
        if all(w is None for w in windows):
            return self
        return replace(self, axes=tuple(a if w is None else a.collapsed() for a, w in zip(self.axes, windows)))

    def encode(self) -> list[int]:
        """As integers, for the operator library: groups, transposed, mode, number of axes, then six per axis."""
        code = [self.groups, int(self.transposed), PADDING_MODES.index(self.mode), len(self.axes)]
        for a in self.axes:
            code += [a.size, a.out, a.kernel, a.stride, a.dilation, a.before]
        return code


@functools.lru_cache(maxsize=256)
def _decode(code: tuple[int, ...]) -> tuple[Geometry, ...]:
    geometries = []
    i = 0
    while i < len(code):
        groups, transposed, mode, n_axes = code[i : i + _HEADER_FIELDS]
        i += _HEADER_FIELDS
        axes = []
        for _ in range(n_axes):
            axes.append(Axis(*code[i : i + _AXIS_FIELDS]))
            i += _AXIS_FIELDS
        geometries.append(Geometry(tuple(axes), groups, bool(transposed), PADDING_MODES[mode]))
    return tuple(geometries)


def decode(code: Sequence[int]) -> tuple[Geometry, ...]:
    """Inverse of ``Geometry.encode`` for a concatenation of any number of geometries."""
    return _decode(tuple(code))
