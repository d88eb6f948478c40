"""The plan of grouped power iteration: index tables and the items of work of both half steps, made once per model.

A plan depends on shapes, strides and dtypes alone, so it is kept and reused as long as these stay. It describes the
geometry to the kernels (csrc/spectral/plan.h has the formula) and divides the work of all layers into items, which
the blocks of one launch take one after the other.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .layout import AXES, IntArray, Layout, Map, Table
from .schedule import GEMM64, TILE_COLUMNS, TILE_ROWS, WORK_ITEM, Tiling, make_schedule, partial_size
from .tables import Tables

# csrc/spectral/plan.h: the same fields in the same order.
OPERATOR_MAP = np.dtype(
    [(n, "<i4") for n in ("op", "dtype", "groups", "rows", "channels", "positions", "inputs")]
    + [(n, "<i4") for n in ("group_stride", "row_stride", "channel_stride", "tap_stride")]
    + [(n, "<i4", AXES) for n in ("size", "slots", "entry")]
    + [(n, "<i4") for n in ("order", "tile_slots", "tiles", "input", "output")]
    + [(n, "<i4") for n in ("norm_in", "norms_in", "norm_out", "norms_out")]
)
VECTOR_SLICE = np.dtype(
    [(n, "<i4") for n in ("op", "second", "first", "length", "output", "norm", "norms", "groups")],
)
PART = np.dtype([(n, "<i4") for n in ("span", "first", "length", "number", "parts", "whole")])  # lanczos.h
_PARTIALS, _LEAST_PARTIALS = 4, 1 << 20  # times the memory of all vectors may go to partial sums, or 4 MB
_PIECE = 2048  # elements that one block normalises (csrc: kFinishLoads)
_LEAST_PART = 4096  # elements that one block orthogonalises at least
_MOST_PARTS = 256  # of a group's vector that is orthogonalised: each block reads the sums of all


class Plan:
    """Tables of one list of operators (maps, items, slices, indices), and the sizes that a call has to allocate."""

    def __init__(self, module: ModuleType, layouts: Sequence[Layout], device: torch.device, parallel: int) -> None:
        sizes = [OPERATOR_MAP.itemsize, WORK_ITEM.itemsize, VECTOR_SLICE.itemsize]
        if module.plan_struct_sizes() != sizes:
            raise RuntimeError(
                f"plan structs differ: {sizes} here, {module.plan_struct_sizes()} in the compiled module"
            )
        # A convolution starts from its input (A first), a matrix from its output (A^T first); a transposed
        # convolution's A is the adjoint of the convolution that describes it.
        forward = [bool(lay.geometry.axes) != lay.geometry.transposed for lay in layouts]
        halves = [[Tiling(Map(lay, f if h == 0 else not f)) for lay, f in zip(layouts, forward)] for h in range(2)]
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
        table = Table()
        slots = [[table.add_slots(t.map, t.active) for t in tilings] for tilings in halves]
        records = [
            self._gather(table, tilings, h, offsets, norm_offsets, halves, slots[h]) for h, tilings in enumerate(halves)
        ]
        budget = max(_PARTIALS * sum(self.result_sizes), _LEAST_PARTIALS)
        # The first counters are those of the items that blocks have taken, of either half step.
        self.n_counters = len(halves)
        items = []
        for tilings, first_norms, of_tiles in zip(halves, norm_offsets, slots):
            items.append(make_schedule(tilings, first_norms, parallel, budget, self.n_counters))
            _set_slots(items[-1], of_tiles)
            self.n_counters = max(self.n_counters, items[-1]["counter"].max(initial=-1).item() + 1)
        self.partial_size = max(partial_size(u) for u in items)
        slices = self._slices(halves, offsets, norm_offsets)
        self.n_items = [len(u) for u in items]
        self.n_slices = len(slices)
        parts = np.concatenate(records), np.concatenate(items), slices, table.array()
        self.tables = Tables(parts, device)

    @functools.cached_property
    def parts(self) -> tuple[Tables, list[int]]:
        """Parts of every group's vectors for the Lanczos start, and their numbers: start side, image side."""
        arrays = [self._parts(half) for half in (1, 0)]
        return Tables(arrays, self.device), [len(array) for array in arrays]

    def _parts(self, half: int) -> npt.NDArray[Any]:
        rows: list[tuple[int, ...]] = []
        span = 0
        for first, length, groups in zip(self.offsets[half], self._lengths[half], self._groups):
            whole = length // groups
            n = min(_MOST_PARTS, -(-whole // _LEAST_PART))
            edges = [whole * i // n for i in range(n + 1)]
            for group in range(groups):
                start = first + group * whole
                rows += [(span, start + a, b - a, i, n, whole) for i, (a, b) in enumerate(itertools.pairwise(edges))]
                span += 1
        return np.array(rows, PART)

    def _gather(
        self,
        table: Table,
        tilings: list[Tiling],
        half: int,
        offsets: list[list[int]],
        norm_offsets: list[list[int]],
        halves: list[list[Tiling]],
        slots: list[IntArray],
    ) -> npt.NDArray[Any]:
        records = np.zeros(len(tilings), OPERATOR_MAP)
        for i, (record, tiling) in enumerate(zip(records, tilings)):
            m = tiling.map
            values: dict[str, Any] = {
                "op": i,
                "dtype": m.layout.dtype,
                "size": m.size,
                "entry": [table.add(e) for e in m.entries],
                "order": -1 if tiling.order is None else table.add(_filled(tiling)),
                "tile_slots": table.add(slots[i]),
                "tiles": len(tiling.active),
                "input": offsets[0][i] if half else 0,
                "output": offsets[half][i],
                "norm_in": norm_offsets[0][i] if half else 0,
                "norms_in": halves[0][i].tiles_per_group if half else 0,
                "norm_out": norm_offsets[half][i],
                "norms_out": tiling.tiles_per_group,
            }
            for name in OPERATOR_MAP.names or ():
                record[name] = values[name] if name in values else getattr(m, name)
        return records

    @staticmethod
    def _slices(
        halves: list[list[Tiling]], offsets: list[list[int]], norm_offsets: list[list[int]]
    ) -> npt.NDArray[Any]:
        slices = []
        for half, tilings in enumerate(halves):
            for i, t in enumerate(tilings):
                per_group = t.map.rows * t.map.positions
                norms = t.tiles_per_group
                for group in range(t.map.groups):
                    for first in range(0, per_group, _PIECE):
                        length = min(_PIECE, per_group - first)
                        norm = norm_offsets[half][i] + group * norms
                        slices.append((i, half, group * per_group + first, length, offsets[half][i], norm, norms, 1))
                if half == 1:
                    slices.append((i, half, 0, 0, 0, norm_offsets[half][i], norms, t.map.groups))
        return np.array(slices, VECTOR_SLICE)


def _shapes(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    g, weight = layout.geometry, (layout.rows, layout.columns)
    return g.out_shape(weight), g.in_shape(weight)


def _lengths(tilings: list[Tiling]) -> list[int]:
    return [t.map.groups * t.map.rows * t.map.positions for t in tilings]


def _set_slots(items: npt.NDArray[Any], of_tiles: list[IntArray]) -> None:
    """Where each item's slots lie in the table, and their number, from those of its operator's tiles."""
    firsts = np.cumsum([0, *map(len, of_tiles)])[:-1]
    items["slots"], items["n_slots"] = np.concatenate(of_tiles)[firsts[items["map"]] + items["tile"]].T


def _filled(tiling: Tiling) -> IntArray:
    """The order of positions, filled up to whole tiles."""
    assert tiling.order is not None
    return np.pad(tiling.order, (0, -len(tiling.order) % TILE_COLUMNS[tiling.kind]), constant_values=-1)


class GradientPlan:
    """Tables of one layer for its weight's gradient (map, indices), and the sizes that a call has to allocate."""

    def __init__(self, layout: Layout, device: torch.device, parallel: int, budget: int) -> None:
        m = Map(layout, forward=True)
        taps = math.prod(m.slots)
        tiles = -(-m.rows // TILE_ROWS) * -(-m.channels * taps // TILE_ROWS)
        size = TILE_ROWS * TILE_COLUMNS[GEMM64]
        # As many parts of the sum over positions as fill the device, of 64 positions at least.
        parts = min(parallel // tiles, -(-m.positions // 64), budget // (tiles * size), 16 if m.groups > 1 else 1 << 30)
        parts = max(1, parts)
        self.sizes = (m.groups, m.rows, m.channels, taps, parts)
        self.partial_size = tiles * parts * size if parts > 1 else 0
        self.n_counters = tiles if parts > 1 else 0
        table = Table()
        record = np.zeros(1, OPERATOR_MAP)
        for name in ("groups", "rows", "channels", "positions", "inputs"):
            record[name] = getattr(m, name)
        for name in ("group_stride", "row_stride", "channel_stride", "tap_stride", "size", "slots"):
            record[name] = getattr(m, name)
        record["entry"] = [table.add(e) for e in m.entries]
        self.tables = Tables([record, table.array()], device)
