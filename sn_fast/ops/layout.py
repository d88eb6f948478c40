"""One linear operator as the kernels see it: where its weights lie, and index tables of what reads what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..reference.geometry import Axis, Geometry
from .library import dtype_code

AXES = 3  # csrc/spectral/plan.h: kAxes
MOST_CHANNELS = 1 << 19  # of a convolution: k = (channel, slot) is taken apart exactly up to there (csrc: Depth)

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Layout:
    """Weight of one operator as the kernels see it: rows x columns x taps, with strides in elements."""

    geometry: Geometry
    rows: int
    columns: int
    row_stride: int
    column_stride: int
    tap_stride: int
    dtype: int

    @staticmethod
    def of(weight: Tensor, geometry: Geometry) -> Layout | None:
        """None where the kernels do not take the weight: another dtype, too large, or taps without one stride."""
        dtype = dtype_code(weight)
        taps = _tap_stride(weight)
        extent = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride()))
        if dtype is None or taps is None or weight.numel() >= 2**31 or extent >= 2**31:
            return None
        rows, columns = weight.shape[:2]
        layout = Layout(geometry, rows, columns, weight.stride(0), weight.stride(1), taps, dtype)
        many = geometry.axes and max(rows // geometry.groups, columns) >= MOST_CHANNELS
        return None if many and not _is_matrix(layout) else layout


def _tap_stride(weight: Tensor) -> int | None:
    """The stride of the kernel's taps, if all axes together have one."""
    stride: int | None = None
    expected = 0
    for size, step in zip(reversed(weight.shape[2:]), reversed(weight.stride()[2:])):
        if size == 1:
            continue
        if stride is None:
            stride = expected = step
        if step != expected:
            return None
        expected = step * size
    return 0 if stride is None else stride


def memory_digits(shape: Sequence[int], dims: Sequence[int]) -> list[tuple[int, int]]:
    """From an element's place in dense memory to its logical index: sizes and strides, fastest first; [] if equal.

    ``dims``: the axes, from the fastest in memory to the slowest.
    """
    digits: list[tuple[int, int]] = []
    for d in dims:
        size, stride = shape[d], math.prod(shape[d + 1 :])
        if size == 1:
            continue
        if digits and stride == digits[-1][0] * digits[-1][1]:
            digits[-1] = (digits[-1][0] * size, digits[-1][1])
        else:
            digits.append((size, stride))
    return digits if len(digits) > 1 else []


class Table:
    """Integers that the kernels index into; equal arrays are stored once, each at a multiple of 16 bytes."""

    def __init__(self) -> None:
        self._parts: list[IntArray] = []
        self._places: dict[bytes, int] = {}
        self._size = 0

    def add(self, values: Any) -> int:
        array = np.ascontiguousarray(values, dtype=np.int32).ravel()
        key = array.tobytes()
        if key not in self._places:
            self._places[key] = self._size
            self._parts.append(np.pad(array, (0, -array.size % 4)))
            self._size += self._parts[-1].size
        return self._places[key]

    def add_slots(self, m: Map, tiles: list[npt.NDArray[Any]]) -> IntArray:
        """The slots of every tile, as csrc/spectral/plan.h has them; returns where they begin and their numbers."""
        along = np.stack(np.unravel_index(np.arange(math.prod(m.slots)), m.slots), axis=1)
        weight = sum(taps[i].astype(np.int64) for taps, i in zip(m.taps, along.T)) * m.tap_stride
        slots = np.column_stack([along, weight])
        return np.array([(self.add(slots[active]), len(active)) for active in tiles], np.int32)

    def array(self) -> IntArray:
        return np.concatenate([*self._parts, np.zeros(1, np.int32)])


class _AxisMap(NamedTuple):
    """One axis in one direction: which input coordinate each slot of each position reads (or -1), and its tap."""

    entry: IntArray  # (positions, slots)
    tap: IntArray  # (slots,)
    inputs: int
    phase: IntArray  # (positions,): positions of one phase read through the same slots


def _forward_axis(axis: Axis, mode: str) -> _AxisMap:
    windows = [axis.window(o, mode) for o in range(axis.out)]
    entry = np.array([[-1 if p is None else p for p in window] for window in windows], np.int32)
    return _AxisMap(entry, np.arange(axis.kernel, dtype=np.int32), axis.size, np.zeros(axis.out, np.int32))


def _adjoint_axis(axis: Axis, mode: str) -> _AxisMap:
    """The inverse: a tap that reads one input for several outputs (a border that repeats) has as many slots."""
    readers: list[list[list[int]]] = [[[] for _ in range(axis.size)] for _ in range(axis.kernel)]
    for o in range(axis.out):
        for t, p in enumerate(axis.window(o, mode)):
            if p is not None:
                readers[t][p].append(o)
    columns, taps = [], []
    for t, of_tap in enumerate(readers):
        for repetition in range(max(map(len, of_tap))):
            columns.append([outs[repetition] if repetition < len(outs) else -1 for outs in of_tap])
            taps.append(t)
    if not columns:  # nothing is ever read: one slot that reads nothing
        columns, taps = [[-1] * axis.size], [0]
    phase = (np.arange(axis.size) + axis.before) % axis.stride
    return _AxisMap(np.array(columns, np.int32).T, np.array(taps, np.int32), axis.out, phase.astype(np.int32))


class Map:
    """One direction of one operator: y = A x, in the terms of csrc/spectral/plan.h."""

    def __init__(self, layout: Layout, forward: bool) -> None:
        g = layout.geometry
        self.layout = layout
        self.groups = g.groups
        rows, columns = layout.rows // g.groups, layout.columns
        self.rows, self.channels = (rows, columns) if forward else (columns, rows)
        strides = layout.row_stride, layout.column_stride
        self.row_stride, self.channel_stride = strides if forward else strides[::-1]
        self.group_stride = rows * layout.row_stride
        self.tap_stride = layout.tap_stride
        axes = g.axes
        if _is_matrix(layout):
            # One window that reads the whole input once: its taps are further columns.
            self._fold_taps(math.prod(a.kernel for a in axes), forward)
            axes = ()
        make = _forward_axis if forward else _adjoint_axis
        missing = _AxisMap(np.zeros((1, 1), np.int32), np.zeros(1, np.int32), 1, np.zeros(1, np.int32))
        self.axes = [missing] * (AXES - len(axes)) + [make(a, g.mode) for a in axes]
        kernel = [1] * (AXES - len(axes)) + [a.kernel for a in axes]
        self.size = [m.entry.shape[0] for m in self.axes]
        self.slots = [m.entry.shape[1] for m in self.axes]
        inputs = [m.inputs for m in self.axes]
        self.positions, self.inputs = math.prod(self.size), math.prod(inputs)
        input_strides = [inputs[1] * inputs[2], inputs[2], 1]
        tap_strides = [kernel[1] * kernel[2], kernel[2], 1]
        self.entries = [np.where(m.entry < 0, -1, m.entry * s) for m, s in zip(self.axes, input_strides)]
        self.taps = [m.tap * s for m, s in zip(self.axes, tap_strides)]

    def _fold_taps(self, taps: int, forward: bool) -> None:
        if forward:
            self.channels, self.channel_stride = self.channels * taps, 1
        else:
            self.rows, self.row_stride = self.rows * taps, 1

    def order(self, columns: int) -> IntArray | None:
        """Positions sorted by phase, each phase filled up to whole tiles of 16; None: as numbered."""
        phases = [m.phase for m in self.axes]
        if all((p == p[0]).all() for p in phases):
            return None
        counts = [int(p.max()) + 1 for p in phases]
        phase = (phases[0][:, None, None] * counts[1] + phases[1][:, None]) * counts[2] + phases[2]
        flat = phase.ravel()
        parts = []
        for value in np.unique(flat):
            members = np.flatnonzero(flat == value)
            parts.append(np.pad(members, (0, -len(members) % min(columns, 16)), constant_values=-1))
        return np.concatenate(parts).astype(np.int32)

    def active_slots(self, order: IntArray | None, columns: int) -> list[npt.NDArray[Any]]:
        """Per tile of positions, the slots through which some position of it reads."""
        places = np.arange(self.positions, dtype=np.int32) if order is None else order
        places = np.pad(places, (0, -len(places) % columns), constant_values=-1)
        along = np.unravel_index(np.maximum(places, 0), self.size)
        a, b, c = ((e >= 0)[i] for e, i in zip(self.entries, along))  # (places, slots) per axis
        a = a & (places >= 0)[:, None]
        return [
            np.flatnonzero(np.einsum("pi,pj,pk->ijk", *(x[i : i + columns].astype(np.float32) for x in (a, b, c))))
            for i in range(0, len(places), columns)
        ]


def _is_matrix(layout: Layout) -> bool:
    """Whether the operator is a matrix whose columns, (channel, tap), lie in memory as the input does."""
    axes = layout.geometry.axes
    taps = math.prod(a.kernel for a in axes)
    return (
        bool(axes)
        and all(a.out == 1 and a.size == a.kernel and a.dilation == 1 and a.before == 0 for a in axes)
        and (taps == 1 or layout.tap_stride == 1)
        and (layout.columns == 1 or layout.column_stride == taps)
    )
