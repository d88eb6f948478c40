"""How the work of one half step is divided among blocks: tiles, and parts of their sums, of known cost."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .layout import IntArray, Map

# csrc/spectral/plan.h: the same fields in the same order.
WORK_ITEM = np.dtype(
    [(n, "<i4") for n in ("kind", "map", "group", "row", "tile", "channel", "channel_end")]
    + [(n, "<i4") for n in ("split", "splits", "counter", "partial", "norm", "slots", "n_slots")]
)
DOT, AXPY, DIRECT, GEMM64, GEMM16 = range(5)

_THREADS = 128
TILE_ROWS = 64  # of a GEMM tile
TILE_COLUMNS = {GEMM64: 64, GEMM16: 16, DIRECT: 128}  # positions of a tile
_SUMS = {DOT: 1, AXPY: 1, DIRECT: 16, GEMM64: 32, GEMM16: 8}  # partial sums of one thread
_DOT_ROWS, _AXPY_LANES, _DIRECT_ROWS, _DIRECT_WARPS = 16, 8, 4, 4
_DIRECT_MOST_ROWS = 8  # above it a GEMM tile wastes less

# Costs in multiply-adds of a wide GEMM tile, of which one of three blocks on a multiprocessor does about 46,000 in a
# microsecond (H200, float32). A weight read from memory takes as long as about 36 of them, and a narrow tile does fewer
# per load from shared memory. The last three are what the multiprocessor has to do, not how long the block takes: other
# blocks compute while one waits. benchmarks/NOTES.md says what of this was measured.
_WEIGHT_COST = 36
_NARROW_COST = 1.4
_DIRECT_COST = 4.0
_ITEM_COST = 60_000  # to start and to end
_PART_COST = 20_000  # to store its sums and be counted
_JOIN_COST = 2.5  # per partial sum that the last part reads

# How finely sums are split, in shares of what one block has to do; the one that ends soonest by the costs above is
# taken. Blocks on one multiprocessor slow each other down, which the schedule does not know: where each has much to do,
# the first of these shares that the memory allows is taken as it is (ResNet-18 on an H200: 210 us with the schedule's
# choice, 157 us with three items for each block).
_SHARES = (0.36, 0.5, 0.65, 0.8, 1.0, 1.4, 2.0, 4.0, 8.0, math.inf)
_MUCH = 460_000  # 10 us
_ENOUGH = 1.03  # times the time in which all blocks, equally busy, would end: nothing better is looked for


class Tiling:
    """How one map is cut into tiles, and what each costs."""

    def __init__(self, m: Map) -> None:
        self.map = m
        bare = m.positions == m.inputs == math.prod(m.slots) == 1
        bare = bare and not any(e.item() or t.item() for e, t in zip(m.entries, m.taps))  # reads, and its first tap
        if bare and (m.channel_stride == 1 or m.channels == 1):
            self.kind = DOT
        elif bare and (m.row_stride == 1 or m.rows == 1):
            self.kind = AXPY
        elif m.rows <= _DIRECT_MOST_ROWS:
            self.kind = DIRECT
        else:
            self.kind = min((GEMM64, GEMM16), key=lambda kind: self._positions(kind)[2])
        self.order, self.active, _ = self._positions(self.kind)
        if self.kind == DOT:
            self.tile_rows = _DOT_ROWS
        elif self.kind == AXPY:
            self.tile_rows = _AXPY_LANES * (4 if m.layout.dtype == 0 else 8)
        else:
            self.tile_rows = _DIRECT_ROWS if self.kind == DIRECT else TILE_ROWS
        self.row_blocks = -(-m.rows // self.tile_rows)

    def _positions(self, kind: int) -> tuple[IntArray | None, list[npt.NDArray[Any]], float]:
        """Order of positions, active slots of each tile, and the cost of all tiles per channel and row of tiles."""
        if kind in (DOT, AXPY):
            return None, [np.zeros(1, np.int64)], 1.0
        columns = TILE_COLUMNS[kind]
        order = self.map.order(columns)
        active = self.map.active_slots(order, columns)
        return order, active, _cost_of_slot(kind, len(active)) * sum(map(len, active))

    @property
    def tiles_per_group(self) -> int:
        return self.row_blocks * len(self.active)

    @property
    def partial_sums(self) -> int:
        """Elements of one part of a tile's split sum."""
        return _SUMS[self.kind] * _THREADS

    def cost(self, tile: int) -> float:
        """Of one tile's whole sum."""
        m, slots = self.map, len(self.active[tile])
        if self.kind in (DOT, AXPY):
            return _WEIGHT_COST * self.tile_rows * m.channels
        rows = _DIRECT_WARPS * _DIRECT_ROWS if self.kind == DIRECT else TILE_ROWS
        return _cost_of_slot(self.kind, len(self.active)) * rows * m.channels * slots


def _cost_of_slot(kind: int, tiles: int) -> float:
    """Of one row, channel and slot of a tile: its products, or its share of a weight that all tiles read."""
    factor = {DIRECT: _DIRECT_COST, GEMM64: 1.0, GEMM16: _NARROW_COST}[kind]
    return max(factor * TILE_COLUMNS[kind], _WEIGHT_COST / tiles)


def make_schedule(
    tilings: Sequence[Tiling], norm_offsets: Sequence[int], parallel: int, budget: int, first_counter: int
) -> npt.NDArray[Any]:
    """All items of one half step, the costly ones first, as ``parallel`` blocks are to take them.

    Sums are split as ends soonest by the costs above. ``budget`` bounds the partial sums (in elements).
    """
    tiles = [_tile_items(t, i, first) for i, (t, first) in enumerate(zip(tilings, norm_offsets))]
    cost = np.concatenate([c for _, c in tiles])
    owners = np.split(np.arange(len(cost)), np.cumsum([len(c) for _, c in tiles])[:-1])
    total = max(1.0, float(cost.sum()))  # 0: nothing is read anywhere
    share = total / parallel
    best: tuple[float, list[npt.NDArray[np.int64]], npt.NDArray[Any]] | None = None
    for part in _SHARES:
        splits = [_splits(t, cost[mine], part * share) for t, mine in zip(tilings, owners)]
        if sum(t.partial_sums * int(s[s > 1].sum()) for t, s in zip(tilings, splits)) > budget:
            continue
        costs = np.concatenate([_costs(t, cost[mine], s) for t, mine, s in zip(tilings, owners, splits)])
        order = np.argsort(-costs, kind="stable")
        ends = last_end(costs[order], parallel)
        if best is None or ends < best[0]:
            best = ends, splits, order
        if share >= _MUCH or best[0] <= _ENOUGH * (share + len(cost) * _ITEM_COST / parallel):
            break
    assert best is not None  # the last splits nothing
    return _cut(tilings, [items for items, _ in tiles], best[1], first_counter)[best[2]]


def last_end(costs: npt.NDArray[np.float64], parallel: int) -> float:
    """When the last of ``parallel`` blocks ends, each of which takes the next item as soon as it is free."""
    busy = costs[:parallel].tolist()
    heapq.heapify(busy)
    for cost in costs[parallel:].tolist():
        heapq.heapreplace(busy, busy[0] + cost)
    return float(max(busy))


def _tile_items(t: Tiling, op: int, first_norm: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """One item per tile of one map (per four, of the direct kind), and the cost of each."""
    m = t.map
    if t.kind == DIRECT:
        first = np.arange(0, m.groups * t.tiles_per_group, _DIRECT_WARPS)
        items = np.zeros(len(first), WORK_ITEM)
        items["row"], items["norm"] = first, first_norm + first
        tiles = (first[:, None] + np.arange(_DIRECT_WARPS)) % len(t.active)
        cost = np.array([t.cost(i) for i in range(len(t.active))])[tiles].max(axis=1)
    else:
        group, block, tile = (x.ravel() for x in np.indices((m.groups, t.row_blocks, len(t.active))))
        items = np.zeros(len(group), WORK_ITEM)
        items["group"], items["row"], items["tile"] = group, block * t.tile_rows, tile
        items["norm"] = first_norm + np.arange(len(group))
        cost = np.array([t.cost(i) for i in range(len(t.active))])[tile]
    items["kind"], items["map"] = t.kind, op
    return items, cost.astype(np.float64)


def _splits(t: Tiling, cost: npt.NDArray[np.float64], target: float) -> npt.NDArray[np.int64]:
    """Into how many parts each tile's sum over channels is cut."""
    least = 64 if t.kind in (DOT, AXPY) else 4 if t.kind == DIRECT else 1
    most = max(1, t.map.channels // least)
    return np.clip(np.ceil(cost / target), 1, most).astype(np.int64)


def _costs(t: Tiling, cost: npt.NDArray[np.float64], splits: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Of all parts. Any may be the one that comes last, and adds them up."""
    joining = np.where(splits > 1, _PART_COST + splits * t.partial_sums * _JOIN_COST, 0.0)
    return np.repeat(cost / splits + _ITEM_COST + joining, splits)


def _cut(
    tilings: Sequence[Tiling],
    tiles: Sequence[npt.NDArray[Any]],
    splits: Sequence[npt.NDArray[np.int64]],
    counter: int,
) -> npt.NDArray[Any]:
    """The items of all tiles, each cut into so many parts."""
    partial = 0
    parts = []
    for t, rows, s in zip(tilings, tiles, splits):
        items = np.repeat(rows, s)
        items["split"] = np.arange(len(items)) - np.repeat(np.cumsum(s) - s, s)
        items["splits"] = np.repeat(s, s)
        channels = t.map.channels
        step = (4 if t.map.layout.dtype == 0 else 8) if t.kind in (DOT, AXPY) else 1  # keeps rows aligned to 16 bytes
        edges = lambda i: np.minimum(-(-channels * i // items["splits"] // step) * step, channels)  # noqa: B023, E731
        number = items["split"].astype(np.int64)  # times channels it may leave int32
        items["channel"], items["channel_end"] = edges(number), edges(number + 1)
        many = s > 1
        sizes = np.where(many, s, 0) * t.partial_sums
        items["counter"] = np.repeat(np.where(many, counter + np.cumsum(many) - 1, -1), s)
        items["partial"] = np.repeat(partial + np.cumsum(sizes) - sizes, s)
        counter += int(many.sum())
        partial += int(sizes.sum())
        parts.append(items)
    return np.concatenate(parts)


def partial_size(items: npt.NDArray[Any]) -> int:
    """Elements of all partial sums."""
    many = items[items["splits"] > 1]
    if not len(many):
        return 0
    sums = np.array([_SUMS[kind] for kind in range(5)])[many["kind"]] * _THREADS
    return int((many["partial"] + many["splits"] * sums).max())
