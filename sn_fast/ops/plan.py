"""The plan of grouped power iteration: index tables and the units of work of both half steps, made once per model.

A plan depends on shapes, strides and dtypes alone, so it is kept and reused as long as these stay. It describes the
geometry to the kernels (csrc/spectral/gather.h has the formula) and divides the work of all layers into units of about
equal cost, which the blocks of one launch take in turn, the costly ones first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..reference.geometry import Axis, Geometry
from .library import dtype_code

_AXES = 3
# csrc/spectral/gather.h: the same fields in the same order.
GATHER = np.dtype(
    [(n, "<i4") for n in ("op", "dtype", "groups", "rows", "channels", "positions", "inputs")]
    + [(n, "<i4") for n in ("group_stride", "row_stride", "channel_stride", "tap_stride")]
    + [(n, "<i4", _AXES) for n in ("size", "slots", "entry", "tap")]
    + [(n, "<i4") for n in ("order", "tile_slots", "tiles", "input", "output")]
    + [(n, "<i4") for n in ("norm_in", "norms_in", "norm_out", "norms_out")]
)
UNIT = np.dtype(
    [(n, "<i4") for n in ("kind", "gather", "group", "row", "tile", "channel", "channel_end")]
    + [(n, "<i4") for n in ("split", "splits", "counter", "partial", "norm")]
)
PIECE = np.dtype(
    [(n, "<i4") for n in ("op", "second", "first", "length", "output", "norm", "norms", "groups")],
)
SPAN = np.dtype([(n, "<i4") for n in ("start_first", "start_length", "image_first", "image_length")])  # lanczos.h
_DOT, _AXPY, _DIRECT, _GEMM64, _GEMM16 = range(5)

_THREADS = 128
_TILE_ROWS = 64  # of a GEMM tile
_TILE_COLUMNS = {_GEMM64: 64, _GEMM16: 16, _DIRECT: 128}  # positions of a tile
_SUMS = {_DOT: 1, _AXPY: 1, _DIRECT: 16, _GEMM64: 32, _GEMM16: 8}  # partial sums of one thread
_DOT_ROWS, _AXPY_LANES, _DIRECT_ROWS, _DIRECT_WARPS = 16, 8, 4, 4
_DIRECT_MOST_ROWS = 8  # above it a GEMM tile wastes less
_PIECE = 4096  # elements that one block normalises

# Costs in multiply-adds of a GEMM tile. A weight read from memory takes as long as about 36 of them (H100: 55 TFLOP/s,
# 3 TB/s), and a narrow tile does fewer per load from shared memory.
_WEIGHT_COST = 36
_NARROW_COST = 1.6
_DIRECT_COST = 4
_LEAST_COST = 1 << 18  # of a unit: below it, starting one costs more than it does

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
        return Layout(geometry, rows, columns, weight.stride(0), weight.stride(1), taps, dtype)


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


class _Table:
    """Integers that the kernels index into; equal arrays are stored once."""

    def __init__(self) -> None:
        self._parts: list[IntArray] = []
        self._places: dict[bytes, int] = {}
        self._size = 0

    def add(self, values: Any) -> int:
        array = np.ascontiguousarray(values, dtype=np.int32).ravel()
        key = array.tobytes()
        if key not in self._places:
            self._places[key] = self._size
            self._parts.append(array)
            self._size += array.size
        return self._places[key]

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


class _Map:
    """One direction of one operator: y = A x, in the terms of csrc/spectral/gather.h."""

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
        self.axes = [missing] * (_AXES - len(axes)) + [make(a, g.mode) for a in axes]
        kernel = [1] * (_AXES - len(axes)) + [a.kernel for a in axes]
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


class _Tiling:
    """How one map is cut into tiles, and what each costs."""

    def __init__(self, m: _Map) -> None:
        self.map = m
        bare = m.positions == m.inputs == math.prod(m.slots) == 1
        bare = bare and not any(e.item() or t.item() for e, t in zip(m.entries, m.taps))  # reads, and its first tap
        if bare and (m.channel_stride == 1 or m.channels == 1):
            self.kind = _DOT
        elif bare and (m.row_stride == 1 or m.rows == 1):
            self.kind = _AXPY
        elif m.rows <= _DIRECT_MOST_ROWS:
            self.kind = _DIRECT
        else:
            self.kind = min((_GEMM64, _GEMM16), key=lambda kind: self._positions(kind)[2])
        self.order, self.active, _ = self._positions(self.kind)
        if self.kind == _DOT:
            self.tile_rows = _DOT_ROWS
        elif self.kind == _AXPY:
            self.tile_rows = _AXPY_LANES * (4 if m.layout.dtype == 0 else 8)
        else:
            self.tile_rows = _DIRECT_ROWS if self.kind == _DIRECT else _TILE_ROWS
        self.row_blocks = -(-m.rows // self.tile_rows)

    def _positions(self, kind: int) -> tuple[IntArray | None, list[npt.NDArray[Any]], float]:
        """Order of positions, active slots of each tile, and the cost of all tiles per channel and row of tiles."""
        if kind in (_DOT, _AXPY):
            return None, [np.zeros(1, np.int64)], 1.0
        columns = _TILE_COLUMNS[kind]
        order = self.map.order(columns)
        active = self.map.active_slots(order, columns)
        factor = _NARROW_COST if kind == _GEMM16 else 1.0
        return order, active, factor * columns * sum(map(len, active))

    @property
    def tiles_per_group(self) -> int:
        return self.row_blocks * len(self.active)

    def cost(self, tile: int) -> int:
        """Of one tile's whole sum."""
        m, slots = self.map, len(self.active[tile])
        if self.kind in (_DOT, _AXPY):
            return _WEIGHT_COST * self.tile_rows * m.channels
        if self.kind == _DIRECT:
            return _DIRECT_COST * _DIRECT_WARPS * _DIRECT_ROWS * _TILE_COLUMNS[_DIRECT] * m.channels * slots
        columns = _TILE_COLUMNS[self.kind]
        return max(columns, _WEIGHT_COST) * _TILE_ROWS * m.channels * slots


class Plan:
    """The tables and units of one list of operators, on the device, and the sizes that a call has to allocate."""

    def __init__(self, module: ModuleType, layouts: Sequence[Layout], device: torch.device, parallel: int) -> None:
        sizes = [GATHER.itemsize, UNIT.itemsize, PIECE.itemsize]
        if module.plan_struct_sizes() != sizes:
            raise RuntimeError(
                f"plan structs differ: {sizes} here, {module.plan_struct_sizes()} in the compiled module"
            )
        # A convolution starts from its input (A first), a matrix from its output (A^T first); a transposed
        # convolution's A is the adjoint of the convolution that describes it.
        forward = [bool(lay.geometry.axes) != lay.geometry.transposed for lay in layouts]
        halves = [[_Tiling(_Map(lay, f if h == 0 else not f)) for lay, f in zip(layouts, forward)] for h in range(2)]
        self.device = device
        self.shapes = [_shapes(lay) for lay in layouts]  # of u and v
        self.starts_from_v = [bool(lay.geometry.axes) for lay in layouts]
        outputs = [_lengths(t) for t in halves]
        self.result_sizes = [sum(lengths) for lengths in outputs]
        self.offsets = offsets = [[0, *np.cumsum(lengths)[:-1].tolist()] for lengths in outputs]
        self._lengths = outputs
        self._groups = [lay.geometry.groups for lay in layouts]
        self.n_spans = sum(self._groups)
        norm_offsets = []
        self.norm_sizes = []
        for tilings in halves:
            counts = [t.tiles_per_group * t.map.groups for t in tilings]
            norm_offsets.append([0, *np.cumsum(counts)[:-1].tolist()])
            self.norm_sizes.append(sum(counts))
        table = _Table()
        records = [self._gather(table, tilings, h, offsets, norm_offsets, halves) for h, tilings in enumerate(halves)]
        budget = sum(self.result_sizes)
        units = [_units(t, norm_offsets[h], parallel, budget) for h, t in enumerate(halves)]
        self.n_counters = sum(u["counter"].max(initial=-1).item() + 1 for u in units)
        units[1]["counter"] += units[0]["counter"].max(initial=-1) + 1
        self.partial_size = max(_partial_size(u) for u in units)
        pieces = self._pieces(halves, offsets, norm_offsets)
        self.n_units = [len(u) for u in units]
        self.n_pieces = len(pieces)
        self._parts = [
            torch.from_numpy(np.ascontiguousarray(part).view(np.int32).reshape(-1)).to(device)
            for part in (np.concatenate(records), np.concatenate(units), pieces, table.array())
        ]

    @property
    def addresses(self) -> list[int]:
        """Of gathers, units, pieces and table."""
        return [part.data_ptr() for part in self._parts]

    @functools.cached_property
    def spans(self) -> Tensor:
        """Per group of each operator, where its vectors lie on the start side and on the other."""
        rows = []
        for i, groups in enumerate(self._groups):
            start, image = (self._lengths[half][i] // groups for half in (1, 0))
            for group in range(groups):
                firsts = self.offsets[1][i] + group * start, self.offsets[0][i] + group * image
                rows.append((firsts[0], start, firsts[1], image))
        return torch.from_numpy(np.array(rows, SPAN).view(np.int32).reshape(-1)).to(self._parts[0].device)

    def _gather(
        self,
        table: _Table,
        tilings: list[_Tiling],
        half: int,
        offsets: list[list[int]],
        norm_offsets: list[list[int]],
        halves: list[list[_Tiling]],
    ) -> npt.NDArray[Any]:
        records = np.zeros(len(tilings), GATHER)
        for i, (record, tiling) in enumerate(zip(records, tilings)):
            m = tiling.map
            slots = [(table.add(active), len(active)) for active in tiling.active]
            values: dict[str, Any] = {
                "op": i,
                "dtype": m.layout.dtype,
                "size": m.size,
                "entry": [table.add(e) for e in m.entries],
                "tap": [table.add(t) for t in m.taps],
                "order": -1 if tiling.order is None else table.add(_filled(tiling)),
                "tile_slots": table.add(slots),
                "tiles": len(tiling.active),
                "input": offsets[0][i] if half else 0,
                "output": offsets[half][i],
                "norm_in": norm_offsets[0][i] if half else 0,
                "norms_in": halves[0][i].tiles_per_group if half else 0,
                "norm_out": norm_offsets[half][i],
                "norms_out": tiling.tiles_per_group,
            }
            for name in GATHER.names or ():
                record[name] = values[name] if name in values else getattr(m, name)
        return records

    @staticmethod
    def _pieces(
        halves: list[list[_Tiling]], offsets: list[list[int]], norm_offsets: list[list[int]]
    ) -> npt.NDArray[Any]:
        pieces = []
        for half, tilings in enumerate(halves):
            for i, t in enumerate(tilings):
                per_group = t.map.rows * t.map.positions
                norms = t.tiles_per_group
                for group in range(t.map.groups):
                    for first in range(0, per_group, _PIECE):
                        length = min(_PIECE, per_group - first)
                        norm = norm_offsets[half][i] + group * norms
                        pieces.append((i, half, group * per_group + first, length, offsets[half][i], norm, norms, 1))
                if half == 1:
                    pieces.append((i, half, 0, 0, 0, norm_offsets[half][i], norms, t.map.groups))
        return np.array(pieces, PIECE)


def _shapes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    g, weight = layout.geometry, (layout.rows, layout.columns)
    return g.out_shape(weight), g.in_shape(weight)


def _lengths(tilings: list[_Tiling]) -> list[int]:
    return [t.map.groups * t.map.rows * t.map.positions for t in tilings]


def _filled(tiling: _Tiling) -> IntArray:
    """The order of positions, filled up to whole tiles."""
    assert tiling.order is not None
    return np.pad(tiling.order, (0, -len(tiling.order) % _TILE_COLUMNS[tiling.kind]), constant_values=-1)


def _units(tilings: list[_Tiling], norm_offsets: list[int], parallel: int, budget: int) -> npt.NDArray[Any]:
    """All units of one half step, the costly ones first. ``budget`` bounds the partial sums (in elements)."""
    tiles = [_tile_units(t, i, first) for i, (t, first) in enumerate(zip(tilings, norm_offsets))]
    total = sum(int(cost.sum()) for _, cost in tiles)
    target = max(_LEAST_COST, total // parallel)
    while True:
        splits = [_splits(t, cost, target) for t, (_, cost) in zip(tilings, tiles)]
        parts = [np.repeat(rows, s) for (rows, _), s in zip(tiles, splits)]
        needed = sum(_SUMS[t.kind] * _THREADS * int(s[s > 1].sum()) for t, s in zip(tilings, splits))
        if needed <= budget:
            break
        target = max(target + 1, target * 5 // 4)
    counter = partial = 0
    costs = []
    for t, (_, cost), s, units in zip(tilings, tiles, splits, parts):
        start = np.repeat(np.cumsum(s) - s, s)
        units["split"] = np.arange(len(units)) - start
        units["splits"] = np.repeat(s, s)
        channels = t.map.channels
        step = 4 if t.kind in (_DOT, _AXPY) else 1  # keeps rows aligned to 16 bytes
        edges = lambda i: np.minimum(-(-channels * i // units["splits"] // step) * step, channels)  # noqa: B023, E731
        number = units["split"].astype(np.int64)  # times channels it may leave int32
        units["channel"], units["channel_end"] = edges(number), edges(number + 1)
        many = s > 1
        tile_counter = np.where(many, counter + np.cumsum(many) - 1, -1)
        size = _SUMS[t.kind] * _THREADS
        tile_partial = partial + (np.cumsum(np.where(many, s, 0)) - np.where(many, s, 0)) * size
        units["counter"], units["partial"] = np.repeat(tile_counter, s), np.repeat(tile_partial, s)
        counter += int(many.sum())
        partial += int(s[many].sum()) * size
        costs.append(np.repeat(cost / s, s))
    order = np.argsort(-np.concatenate(costs), kind="stable")
    return np.concatenate(parts)[order]


def _tile_units(t: _Tiling, op: int, first_norm: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """One unit per tile of one map (per four, of the direct kind), and the cost of each."""
    m = t.map
    if t.kind == _DIRECT:
        first = np.arange(0, m.groups * t.tiles_per_group, _DIRECT_WARPS)
        units = np.zeros(len(first), UNIT)
        units["row"], units["norm"] = first, first_norm + first
        cost = np.full(len(first), max(map(t.cost, range(len(t.active)))))
    else:
        group, block, tile = (x.ravel() for x in np.indices((m.groups, t.row_blocks, len(t.active))))
        units = np.zeros(len(group), UNIT)
        units["group"], units["row"], units["tile"] = group, block * t.tile_rows, tile
        units["norm"] = first_norm + np.arange(len(group))
        cost = np.array([t.cost(i) for i in range(len(t.active))])[tile]
    units["kind"], units["gather"] = t.kind, op
    return units, cost.astype(np.float64)


def _splits(t: _Tiling, cost: npt.NDArray[np.float64], target: int) -> npt.NDArray[np.int64]:
    """Into how many parts each tile's sum over channels is cut."""
    least = 64 if t.kind in (_DOT, _AXPY) else 4 if t.kind == _DIRECT else 1
    most = max(1, t.map.channels // least)
    return np.clip(np.ceil(cost / target), 1, most).astype(np.int64)


def _partial_size(units: npt.NDArray[Any]) -> int:
    many = units[units["splits"] > 1]
    if not len(many):
        return 0
    sums = np.array([_SUMS[k] for k in range(5)])[many["kind"]] * _THREADS
    return int((many["partial"] + many["splits"] * sums).max())


class GradientPlan:
    """The map of one layer for its weight's gradient, on the device, and the sizes that a call has to allocate."""

    def __init__(self, layout: Layout, device: torch.device, parallel: int, budget: int) -> None:
        m = _Map(layout, forward=True)
        taps = math.prod(m.slots)
        tiles = -(-m.rows // _TILE_ROWS) * -(-m.channels * taps // _TILE_ROWS)
        size = _SUMS[_GEMM64] * _THREADS
        # As many parts of the sum over positions as fill the device, of 64 positions at least.
        parts = min(parallel // tiles, -(-m.positions // 64), budget // (tiles * size), 16 if m.groups > 1 else 1 << 30)
        parts = max(1, parts)
        self.sizes = (m.groups, m.rows, m.channels, taps, parts)
        self.partial_size = tiles * parts * size if parts > 1 else 0
        self.n_counters = tiles if parts > 1 else 0
        table = _Table()
        record = np.zeros(1, GATHER)
        for name in ("groups", "rows", "channels", "positions", "inputs"):
            record[name] = getattr(m, name)
        for name in ("group_stride", "row_stride", "channel_stride", "tap_stride", "size", "slots"):
            record[name] = getattr(m, name)
        record["entry"] = [table.add(e) for e in m.entries]
        self._parts = [torch.from_numpy(part.view(np.int32).reshape(-1)).to(device) for part in (record, table.array())]

    @property
    def addresses(self) -> list[int]:
        """Of the gather and the table."""
        return [part.data_ptr() for part in self._parts]
