"""Grouped power iteration by every kind of tile: their edges, and their precisions."""

from __future__ import annotations

import itertools
from types import ModuleType

import pytest
import torch

from sn_fast import MatrixOperator
from sn_fast.layers import LayerOperator

from .power_steps import CHOSEN, KINDS, Call, check_precision, kinds_of, planning
from .small_operators import DTYPES, line, matrix


def test_chosen_shapes_hit_every_kind_of_tile_whole_and_split() -> None:
    hit = set[tuple[str, bool]]().union(*(kinds_of(Call.of(make())) for make in CHOSEN.values()))
    assert hit == {(kind, split) for kind in KINDS for split in (False, True)}


@pytest.mark.parametrize("name", CHOSEN)
def test_kinds_of_tiles(kernels: ModuleType, name: str) -> None:
    op = CHOSEN[name]()
    for dtype in DTYPES:
        Call.of(LayerOperator(op.weight.to(dtype), op.geometry)).check()


@pytest.mark.parametrize("precision", ["tf32", "3xtf32", "bf16"])
@pytest.mark.parametrize("name", [name for name in CHOSEN if "matrix" not in name])
def test_precisions(rounding_kernels: ModuleType, name: str, precision: str) -> None:
    check_precision(CHOSEN[name](), precision)


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 2.0), ("3xtf32", 4.0)])
def test_long_sums_are_sums_of_sums(kernels: ModuleType, precision: str, factor: float) -> None:
    """The error of thousands of products in one sum, without parts, stays near PyTorch's, which adds in blocks."""
    long = [line(4, 1500, 20), line(4, 5000, 20, 1), line(20, 1500, 20), line(20, 500, 70, 9), matrix(20, 20_000)]
    with planning(_ITEM_COST=1 << 50):
        Call.of(*long).check(precision=precision, factor=factor)


@pytest.mark.parametrize("scale", [1e-30, 1e-34, 1e-36, 1e-38])
def test_3xtf32_of_tiny_weights(kernels: ModuleType, scale: float) -> None:
    """As accurate as fp32 until the lower part has lost bits: it is a multiple of 2^-136."""
    op = CHOSEN["gemm64"]()
    call = Call.of(LayerOperator(op.weight * scale, op.geometry))
    exact = Call(call.operators, *([x.double() for x in xs] for xs in (call.us, call.vs))).by_reference()[0][0]
    error = float((call.run(precision="3xtf32")[0][0] - exact).norm())
    assert error < 5e-7 + 2.0**-137 / scale


def test_lower_precision_is_lower(rounding_kernels: ModuleType) -> None:
    """The precisions do what their names say: the error is that of rounding the operands."""
    call = Call.of(CHOSEN["gemm64"]())
    exact = Call(call.operators, *([x.double() for x in xs] for xs in (call.us, call.vs))).by_reference()[0][0]
    errors = [float((call.run(precision=p)[0][0] - exact).norm()) for p in ("fp32", "3xtf32", "tf32", "bf16")]
    assert errors[0] < 5e-7
    assert errors[1] < 2e-6
    assert 1e-4 < errors[2] < 1e-3
    assert 1e-3 < errors[3] < 1e-2


@pytest.mark.parametrize("narrow", [False, True], ids=["gemm64", "gemm16"])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_edges_of_gemm_tiles(rounding_kernels: ModuleType, narrow: bool, precision: str) -> None:
    with planning(_NARROW_COST=0.1 if narrow else 1e9, _DIRECT_MOST_ROWS=0):
        for rows in (1, 16, 17, 63, 64, 65):
            for positions in (1, 15, 16, 17, 63, 64, 65, 130):
                depth = 1 + (rows + positions) % 7  # channels
                check_precision(line(rows, depth, positions), precision)
        for channels, kernel in ((15, 1), (16, 1), (17, 1), (5, 3), (1, 16), (1, 17), (31, 1), (11, 3), (3, 11)):
            check_precision(line(9, channels, 20, kernel), precision)


@pytest.mark.parametrize("split", [False, True])
def test_edges_of_other_tiles(kernels: ModuleType, split: bool) -> None:
    with planning(split=split):
        for rows in (1, 3, 4, 5, 7, 8):
            lengths = (1, 31, 32, 33, 127, 128, 129, 260)
            Call.of(*(line(rows, 1 + (rows + length) % 17, length) for length in lengths)).check()
        for dtype in DTYPES:
            sizes = [*itertools.product((1, 4, 15, 16, 17, 33), (1, 3, 5, 8, 31, 32, 33, 63, 64, 65, 129))]
            sizes += [(5, columns) for columns in (1023, 1024, 1025, 2049)]
            Call.of(*(MatrixOperator(torch.randn(size).to(dtype)) for size in sizes)).check()
