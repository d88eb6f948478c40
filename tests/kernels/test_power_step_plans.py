"""The plans of grouped power iteration: every result is computed once, however sums are split."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sn_fast import LinearOperator
from sn_fast.ops import schedule
from sn_fast.ops.layout import MOST_CHANNELS, Layout, Map
from sn_fast.ops.schedule import Tiling
from sn_fast.reference.geometry import Geometry

from .power_steps import KINDS, Call, items_of, maps_of, operators, plan_from, plan_of
from .small_operators import conv, drawn, matrix


def check_plan(call: Call, parallel: int = 9) -> None:
    """Every result is computed once, from all channels, in parts that do not share memory."""
    plan = plan_of(call, parallel)
    counters: set[int] = set()
    for half, (maps, items) in enumerate(zip(maps_of(plan), items_of(plan))):
        norms: set[int] = set()
        partials: list[tuple[int, int]] = []
        for op, g in enumerate(maps):
            mine = items[items["map"] == op]
            assert g["op"] == op
            kind = KINDS[mine["kind"][0]]
            assert (mine["kind"] == mine["kind"][0]).all()
            rows = {"dot": 16, "axpy": 32 if g["dtype"] == 0 else 64, "direct": 4}.get(kind, 64)
            tiles = g["groups"] * -(-g["rows"] // rows) * g["tiles"]
            assert g["norms_out"] * g["groups"] == tiles
            keys = list(zip(*(mine[name].tolist() for name in ("group", "row", "tile"))))
            assert len(set(keys)) == (-(-tiles // 4) if kind == "direct" else tiles)
            for key in set(keys):
                parts = np.sort(mine[[k == key for k in keys]], order="split")
                assert (parts["split"] == np.arange(len(parts))).all()
                assert (parts["splits"] == len(parts)).all()
                assert parts["channel"][0] == 0
                assert parts["channel_end"][-1] == g["channels"]
                assert (parts["channel"][1:] == parts["channel_end"][:-1]).all()
                assert (parts["channel"] < parts["channel_end"]).all()
                assert len(set(parts["norm"])) == 1
                assert parts["norm"][0] >= g["norm_out"]
                norms.update(range(parts["norm"][0], parts["norm"][0] + (4 if kind == "direct" else 1)))
                if len(parts) > 1:
                    assert len(set(parts["counter"])) == len(set(parts["partial"])) == 1
                    assert parts["counter"][0] not in counters
                    counters.add(int(parts["counter"][0]))
                    size = 128 * {"dot": 1, "axpy": 1, "direct": 16, "gemm64": 32, "gemm16": 8}[kind]
                    partials.append((int(parts["partial"][0]), len(parts) * size))
        assert norms >= set(range(plan.norm_sizes[half]))
        end = 0
        for first, size in sorted(partials):
            assert first >= end
            end = first + size
        assert end <= plan.partial_size
    assert counters == set(range(2, plan.n_counters))  # the first two count the items taken
    assert plan.partial_size <= max(4 * sum(plan.result_sizes), 1 << 20)


@drawn(60)
@given(mixture=st.lists(operators(), min_size=1, max_size=4), parallel=st.sampled_from([1, 9, 400]))
def test_plans_cover_all_work_once(mixture: list[LinearOperator], parallel: int) -> None:
    check_plan(Call.of(*mixture), parallel)


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("parallel", [3 * 132, 3])
def test_plan_of_resnet18(reduced: bool, parallel: int) -> None:
    chosen = resnet18(reduced)
    call = Call.of(*chosen)
    check_plan(call, parallel)
    for items in items_of(plan_of(call, parallel)):
        assert parallel == 3 or (items["splits"] > 1).any()


def test_plans_of_long_sums_do_not_overflow() -> None:
    """12 million columns times hundreds of parts is more than 2^31."""
    layout = Layout(Geometry(), 16, 12_000_000, 12_000_000, 1, 0, 0)
    plan = plan_from([layout], parallel=396)
    for items, channels in zip(items_of(plan), (16, 12_000_000)):
        assert (items["channel"] < items["channel_end"]).all()
        assert items["channel_end"].max() == channels
    assert len(items_of(plan)[1]) > 100


def resnet18(reduced: bool = True) -> list[LinearOperator]:
    chosen: list[LinearOperator] = [conv(64, 3, (3, 3), (32, 32), padding=1)]
    for width, size in ((64, 32), (128, 16), (256, 8), (512, 4)):
        before = max(64, width // 2)
        chosen += [conv(width, width, (3, 3), (size, size), padding=1)] * (4 if width == 64 else 3)
        if width > 64:
            chosen.append(conv(width, before, (3, 3), (2 * size, 2 * size), padding=1, stride=2))
            chosen.append(conv(width, before, (1, 1), (2 * size, 2 * size), stride=2))
    return [op.reduced() if reduced else op for op in (*chosen, matrix(10, 512))]


def test_blocks_end_together() -> None:
    """With the costs that the plan reckons with: none works much longer than the mean, and little is done twice.

    Where each has much to do, it has three items or so: real blocks are not as even as the costs.
    """
    call = Call.of(*resnet18())
    layouts = [Layout.of(op.weight, op.geometry) for op in call.operators]
    for half, items in enumerate(items_of(plan_of(call, 396))):
        tilings = [Tiling(Map(layout, forward=bool(layout.geometry.axes) == (half == 0))) for layout in layouts]
        work, costs = 0.0, []
        for item in items:
            t = tilings[item["map"]]
            kind = KINDS[item["kind"]]
            whole = max(map(t.cost, range(len(t.active)))) if kind == "direct" else t.cost(item["tile"])
            part = whole * (item["channel_end"] - item["channel"]) / t.map.channels
            work += part
            extra = schedule._PART_COST + item["splits"] * t.partial_sums * schedule._JOIN_COST
            costs.append(part + schedule._ITEM_COST + (extra if item["splits"] > 1 else 0.0))
        ends = schedule.last_end(np.array(costs), 396)
        assert 2.5 * 396 < len(items) < 4 * 396
        assert max(costs) <= 0.7 * work / 396
        assert ends <= 1.25 * sum(costs) / 396
        assert ends <= 1.4 * work / 396
        # The costly ones first: what comes late is no longer.
        assert max(costs[len(costs) // 2 :]) <= 1.05 * np.median(costs[: len(costs) // 2])


def test_parts_are_few_where_blocks_are() -> None:
    """Every part costs: one block needs none."""
    for items in items_of(plan_of(Call.of(*resnet18()), 1)):
        assert (items["splits"] == 1).all()


def test_the_budget_holds_for_one_long_sum() -> None:
    """A matrix of few rows: its vectors are small, and so are its parts' sums."""
    plan = plan_from([Layout(Geometry(), 16, 1 << 20, 1 << 20, 1, 0, 0)], parallel=396)
    assert (items_of(plan)[0]["splits"] > 50).all() or (items_of(plan)[1]["splits"] > 50).all()
    assert plan.partial_size <= 4 * sum(plan.result_sizes)


def test_depths_are_taken_apart_exactly() -> None:
    """k / slots by the high half of a product, as csrc/spectral/gemm.cuh does it, as far as plans let k go."""
    for slots in range(1, 65):
        most = min(1 << 30, MOST_CHANNELS * slots)
        multiples = np.unique(np.linspace(0, most // slots, 20000).astype(np.uint64)) * np.uint64(slots)
        k = np.concatenate([multiples, multiples[1:] - np.uint64(1)])
        k = k[k < most]
        inverse = np.uint64((2**31 + slots - 1) // slots)
        assert ((np.uint64(2) * k * inverse >> np.uint64(32)) == k // np.uint64(slots)).all()


def test_too_many_channels_for_that_are_left_to_the_reference() -> None:
    geometry = conv(16, 2, (3,), (8,)).geometry
    for channels, taken in ((MOST_CHANNELS - 1, True), (MOST_CHANNELS, False)):
        assert (Layout.of(torch.empty(16, channels, 3, device="meta"), geometry) is not None) == taken
    matrix_of_a_kernel = conv(16, 2, (3,), (3,)).geometry  # one window: a matrix, whose columns need no taking apart
    assert Layout.of(torch.empty(16, MOST_CHANNELS, 3, device="meta"), matrix_of_a_kernel) is not None
