"""The kernels of grouped power iteration, on the CPU, against the reference in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sn_fast import ConvOperator, LinearOperator, MatrixOperator
from sn_fast.ops import power_step as ops
from sn_fast.ops.plan import Layout
from sn_fast.reference.geometry import Axis, Geometry
from sn_fast.reference.linear_map import matvec, rmatvec

from ..attacks.models import same_bits
from ..operators.geometries import cases
from .conftest import THREAD_ORDERS
from .power_steps import (
    KINDS,
    Call,
    gathers_of,
    judge,
    kinds_of,
    plan_from,
    plan_of,
    planning,
    units_of,
    useful_products,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def conv(rows: int, columns: int, kernel: Sequence[int], size: Sequence[int], **options: Any) -> ConvOperator:
    groups = options.get("groups", 1)
    return ConvOperator(torch.randn(rows, columns // groups, *kernel), size, **options)


def matrix(rows: int, columns: int) -> MatrixOperator:
    return MatrixOperator(torch.randn(rows, columns))


def line(rows: int, columns: int, positions: int, kernel: int = 3) -> ConvOperator:
    """A convolution with as many outputs as inputs."""
    return conv(rows, columns, (kernel,), (positions,), padding="same")


# -- every geometry ---------------------------------------------------------------------------------------------------


@st.composite
def operators(draw: st.DrawFn, most_products: int = 1_000_000) -> LinearOperator:
    """Convolutions of every geometry, as they are or reduced, with few or many channels, and matrices."""
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.integers(0, 5)) == 0:
        rows, columns = (draw(st.sampled_from([1, 2, 7, 16, 17, 33, 300])) for _ in range(2))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
        return MatrixOperator(weight.to(dtype))
    case = draw(cases())
    factors = (draw(st.sampled_from([1, 1, 5, 12])) for _ in range(2))
    case = replace(case, cin=case.cin * next(factors), cout=case.cout * next(factors))
    op = case.operator(dtype)
    if draw(st.booleans()):
        op = op.reduced()
    assume(useful_products(Call([op], [], [])) <= most_products)
    return op


properties = settings(suppress_health_check=list(HealthCheck), deadline=None)


@settings(properties, max_examples=200)
@given(
    mixture=st.lists(operators(), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    order=st.sampled_from(THREAD_ORDERS),
    split=st.booleans(),
)
def test_every_geometry(kernels: ModuleType, mixture: list[LinearOperator], seed: int, order: int, split: bool) -> None:
    kernels.set_thread_order(order)
    with planning(split=split):
        Call.of(*mixture, seed=seed).check()


@settings(properties, max_examples=60)
@given(
    op=operators(300_000),
    order=st.sampled_from(THREAD_ORDERS),
    narrow=st.booleans(),
    split=st.booleans(),
    precision=st.sampled_from(["tf32", "3xtf32", "bf16"]),
)
def test_every_geometry_in_every_precision(
    kernels: ModuleType, op: LinearOperator, order: int, narrow: bool, split: bool, precision: str
) -> None:
    kernels.set_thread_order(order)
    with planning(split=split, _DIRECT_MOST_ROWS=0, _NARROW_COST=0.1 if narrow else 1e9):
        check_precision(op, precision)


@pytest.mark.parametrize("n_iterations", [1, 2, 5])
def test_iterations(kernels: ModuleType, n_iterations: int) -> None:
    call = Call.of(
        conv(20, 12, (3, 3), (8, 8), padding=1),
        matrix(40, 70),
        conv(12, 12, (3, 3), (6, 6), padding=1, groups=12),
        conv(9, 12, (4,), (7,), stride=2, transposed=True),
    )
    call.check(n_iterations)


def test_dense_operators(kernels: ModuleType) -> None:
    """Against plain matrices: one iteration, and the top singular pair, which an iteration keeps."""
    chosen = [
        conv(12, 10, (3, 3), (6, 5), padding=1, stride=2),
        conv(9, 2, (3,), (9,), padding=2, dilation=2, padding_mode="replicate"),
        conv(10, 9, (2, 3), (3, 4), stride=2, transposed=True, output_padding=1),
        matrix(20, 30),
    ]
    call = Call.of(*chosen)
    us, vs, sigmas, groups = call.run()
    for i, op in enumerate(chosen):
        dense = LinearOperator(op.weight.double(), op.geometry).to_dense()
        u, v = call.us[i].double().flatten(), call.vs[i].double().flatten()
        if op.geometry.axes:
            u = dense @ v
            v = dense.T @ (u / u.norm())
            sigma = v.norm()
        else:
            v = dense.T @ u
            u = dense @ (v / v.norm())
            sigma = u.norm()
        torch.testing.assert_close(us[i].double().flatten(), u / u.norm(), rtol=0, atol=1e-6)
        torch.testing.assert_close(vs[i].double().flatten(), v / v.norm(), rtol=0, atol=1e-6)
        torch.testing.assert_close(sigmas[i].double(), sigma, rtol=1e-6, atol=0)
        assert groups[i] == 0
        left, values, right = torch.linalg.svd(dense)
        call.us[i], call.vs[i] = left[:, 0].float().reshape(op.out_shape), right[0].float().reshape(op.in_shape)
        _, _, (top,), _ = Call([op], [call.us[i]], [call.vs[i]]).run()
        torch.testing.assert_close(top.double(), values[0], rtol=1e-6, atol=0)


def test_more_operators_than_one_launch_takes(kernels: ModuleType) -> None:
    mixture = [matrix(1 + i % 5, 1 + i % 7) if i % 2 else line(1 + i % 11, 1 + i % 3, 5) for i in range(203)]
    call = Call.of(*mixture)
    found, single = call.run(2), Call(mixture[-5:], call.us[-5:], call.vs[-5:]).run(2)
    exact = Call(mixture, *([x.double() for x in xs] for xs in (call.us, call.vs))).by_reference(2)
    for part, last, wanted in zip(found[:3], single, exact):
        assert len(part) == 203
        for a, b in zip(part, wanted):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)
        assert all(map(same_bits, part[-5:], last))


def test_no_operators(kernels: ModuleType) -> None:
    assert [list(part) for part in Call.of().run()] == [[], [], [], []]


def test_one_window_that_reads_padding_is_no_matrix(kernels: ModuleType) -> None:
    """Size 1 in, size 1 out, one slot: but it reads nothing, or a tap that is not the first."""
    nothing = ConvOperator(torch.randn(5, 3, 1), (1,), padding=((1, 0),), stride=2)
    assert nothing.to_dense().abs().sum() == 0
    third = LinearOperator(torch.randn(15, 2, 4), Geometry((Axis(1, 1, 4, 4, 1, 2),)))
    call = Call.of(nothing, nothing.reduced(), third, ConvOperator(third.weight, (1,), padding=((2, 1),)))
    found = call.check()
    assert found[2][0] == 0
    assert torch.equal(found[0][0], call.us[0])
    assert torch.equal(found[1][0], call.vs[0])


# -- kinds of tiles, their edges, precisions --------------------------------------------------------------------------

CHOSEN: dict[str, Callable[[], LinearOperator]] = {
    "gemm64": lambda: line(70, 20, 70),
    "gemm64_split": lambda: conv(64, 128, (3, 3), (8, 8), padding=1),
    "gemm16": lambda: conv(40, 30, (3, 3), (4, 4), padding=1),
    "gemm16_split": lambda: conv(70, 80, (3, 3), (4, 4), padding=1),
    "direct": lambda: conv(4, 3, (3, 3), (12, 12), padding=1),
    "direct_split": lambda: conv(3, 64, (3, 3), (12, 12), padding=1),
    "depthwise": lambda: conv(48, 48, (3, 3), (7, 7), padding=1, groups=48),
    "grouped": lambda: conv(96, 40, (3, 3), (5, 5), padding=1, groups=2),
    "matrix": lambda: matrix(21, 50),
    "matrix_wide_split": lambda: matrix(40, 3000),
    "matrix_tall_split": lambda: matrix(3000, 40),
    "point": lambda: conv(40, 30, (1, 1), (1, 1)),
    "patch": lambda: conv(20, 3, (4, 4), (16, 16), stride=4).reduced(),
    "stride": lambda: conv(33, 17, (3, 3), (9, 8), stride=2, padding=1),
    "stride_3": lambda: conv(33, 17, (5, 4), (21, 20), stride=3, padding=2),
    "81_slots": lambda: conv(20, 12, (9, 9), (10, 10), padding=4),
    "64_slots": lambda: conv(20, 10, (8, 8), (9, 9), padding=4),
    "65_slots": lambda: conv(20, 10, (13, 5), (13, 5), padding="same"),
    "81_slots_split": lambda: conv(12, 100, (9, 9), (5, 5), padding=4),
    "81_slots_direct": lambda: conv(4, 30, (9, 9), (6, 6), padding=4),
    "one_channel": lambda: line(33, 1, 20),
    "one_row": lambda: line(1, 33, 20),
    "8_rows": lambda: line(8, 9, 140),
    "9_rows": lambda: line(9, 8, 140),
}


def test_chosen_shapes_hit_every_kind_of_tile_whole_and_split() -> None:
    hit = set[tuple[str, bool]]().union(*(kinds_of(Call.of(make())) for make in CHOSEN.values()))
    assert hit == {(kind, split) for kind in KINDS for split in (False, True)}


@pytest.mark.parametrize("name", CHOSEN)
def test_kinds_of_tiles(kernels: ModuleType, name: str) -> None:
    op = CHOSEN[name]()
    for dtype in DTYPES:
        Call.of(LinearOperator(op.weight.to(dtype), op.geometry)).check()


def round_operands(precision: str, *operands: Tensor) -> list[Tensor]:
    """As matrix instructions read them."""
    if precision == "bf16":
        return [x.bfloat16().to(x.dtype) for x in operands]
    if precision == "tf32":  # 10 bits behind the point, to nearest
        exponents = torch.frexp(torch.stack([x.abs().amax() for x in operands]))[1]
        assert exponents.abs().max() < 100  # no denormals
        scaled = [torch.frexp(x) for x in operands]
        return [torch.ldexp((m.double() * 2**11 + 0.5 * m.sign()).trunc() / 2**11, e).to(m.dtype) for m, e in scaled]
    return list(operands)


def check_precision(op: LinearOperator, precision: str) -> None:
    """Each half step of its own, from the very input it had, with operands rounded as GEMM tiles round them."""
    call = Call.of(op)
    if precision in ("fp32", "3xtf32"):
        call.check(precision=precision, factor=2.0 if precision == "fp32" else 4.0)
        return
    (u,), (v,), (sigma,), _ = call.run(precision=precision)
    first, second = (set(units["kind"]) for units in units_of(plan_of(call)))
    g = op.geometry
    halves: list[tuple[Callable[..., Tensor], Tensor, Tensor, set[int]]] = [
        (matvec, call.vs[0], u, first),
        (rmatvec, u, v, second),
    ]
    if not g.axes:
        halves = [(rmatvec, call.us[0], v, first), (matvec, v, u, second)]
    for apply, start, found, kinds in halves:

        def normalized(weight: Tensor, x: Tensor, apply: Callable[..., Tensor] = apply) -> list[Tensor]:
            groups = apply(x[None], weight, g)[0].reshape(g.groups, -1)
            norms = groups.norm(dim=1, keepdim=True)
            return [groups / norms.clamp(min=1e-30), norms.max()]

        gemm = any(KINDS[kind].startswith("gemm") for kind in kinds)
        operands = round_operands(precision if gemm else "fp32", op.weight.float(), start)
        alive = bool((normalized(*operands)[0].norm(dim=1) > 0).all())
        if alive:
            last = found is halves[1][2]
            results = [found.reshape(g.groups, -1), sigma if last else normalized(*(x.double() for x in operands))[1]]
            # Matrix instructions add one product after the other; that is still far below what rounding costs.
            judge(results, normalized, operands, [g.groups, 1], factor=8.0 if gemm else 2.0)


@pytest.mark.parametrize("precision", ["tf32", "3xtf32", "bf16"])
@pytest.mark.parametrize("name", [name for name in CHOSEN if "matrix" not in name])
def test_precisions(kernels: ModuleType, name: str, precision: str) -> None:
    check_precision(CHOSEN[name](), precision)


@pytest.mark.parametrize(("precision", "factor"), [("fp32", 2.0), ("3xtf32", 4.0)])
def test_long_sums_are_sums_of_sums(kernels: ModuleType, precision: str, factor: float) -> None:
    """The error of thousands of products in one sum, without parts, stays near PyTorch's, which adds in blocks."""
    long = [line(4, 1500, 20), line(4, 5000, 20, 1), line(20, 1500, 20), line(20, 500, 70, 9), matrix(20, 20_000)]
    with planning(_LEAST_COST=1 << 50):
        Call.of(*long).check(precision=precision, factor=factor)


def test_lower_precision_is_lower(kernels: ModuleType) -> None:
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
def test_edges_of_gemm_tiles(kernels: ModuleType, narrow: bool, precision: str) -> None:
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


# -- layouts of weights -----------------------------------------------------------------------------------------------


def unaligned(weight: Tensor, offset: int = 1) -> Tensor:
    return torch.empty(weight.numel() + offset, dtype=weight.dtype)[offset:].reshape(weight.shape).copy_(weight)


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {  # and whether kernels take it
    "contiguous": (Tensor.contiguous, True),
    "channels_last": (lambda w: w.contiguous(memory_format=torch.channels_last), True),
    "transposed": (lambda w: w.transpose(0, 1).contiguous().transpose(0, 1), True),
    "unaligned": (unaligned, True),
    "every_other_row": (lambda w: torch.stack([w, w], dim=1)[:, 0], True),
    "every_other_column": (lambda w: torch.stack([w, w], dim=2)[:, :, 0], True),
    "first_row_everywhere": (lambda w: w[:1].expand(w.shape), True),
    "every_other_tap": (lambda w: torch.stack([w, w], dim=-1)[..., 0], True),
    "taps_transposed": (lambda w: w.mT.contiguous().mT, False),
    "taps_with_holes": (lambda w: torch.cat([w, w], dim=-1)[..., : w.shape[-1]], False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_convolutions(kernels: ModuleType, layout: str, dtype: torch.dtype) -> None:
    laid_out, taken = LAYOUTS[layout]
    for shape, size, options in (
        ((12, 10, 3, 2), (5, 6), {"padding": 1}),
        ((5, 2, 2, 3), (6, 6), {"stride": 2}),
        ((12, 4, 2, 2), (2, 2), {}),  # a matrix, if its columns lie as the input does
        ((12, 3, 2, 2), (5, 5), {"groups": 4}),
    ):
        weight = torch.randn(shape).to(dtype)
        op = ConvOperator(laid_out(weight), size, **options)  # type: ignore[arg-type]
        assert layout == "first_row_everywhere" or torch.equal(op.weight, weight)
        assert (Layout.of(op.weight, op.geometry) is not None) == taken
        call = Call.of(op)
        found = call.check()
        if not taken:
            assert all(map(same_bits, map(torch.stack, found[:3]), map(torch.stack, call.by_reference()[:3])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [False, True])
def test_layouts_of_matrices(kernels: ModuleType, dtype: torch.dtype, split: bool) -> None:
    views = [
        *(torch.randn(70, 301)[:, i : 200 + i] for i in range(5)),
        *(torch.randn(200, 72).T[i : 60 + i] for i in range(3)),
        *(torch.randn(200, 71).T[i : 60 + i] for i in range(2)),
        torch.randn(70, 200)[:, ::2],
        torch.randn(70, 200).T[:, ::2],
        torch.randn(70, 1).expand(70, 90),
        unaligned(torch.randn(64, 64), 2),
    ]
    with planning(split=split):
        for view in views:
            storage = view.as_strided((view.untyped_storage().nbytes() // 4,), (1,), 0).to(dtype)
            same = storage.as_strided(view.shape, view.stride(), view.storage_offset())
            Call.of(MatrixOperator(same), MatrixOperator(unaligned(same))).check()


def test_layouts_beyond_32_bit_offsets_are_not_taken() -> None:
    for shape, strides in (((3, 3), (2**30, 1)), ((2, 3), (1, 2**30)), ((2, 2, 3), (1, 2, 2**30))):
        weight = torch.empty_strided(shape, strides, device="meta")
        geometry = Geometry((Axis(5, 3, 3, 1, 1, 0),)) if len(shape) == 3 else Geometry()
        taken = sum((n - 1) * s for n, s in zip(shape, strides)) < 2**31
        assert (Layout.of(weight, geometry) is not None) == taken


def test_start_vectors_of_any_layout(kernels: ModuleType) -> None:
    call = Call.of(conv(12, 10, (3, 3), (5, 6), padding=1), matrix(20, 30))
    exact = call.run()
    call.us = [u.transpose(0, -1).contiguous().transpose(0, -1) if u.ndim > 1 else u for u in call.us]
    call.vs = [torch.stack([v, v], dim=-1)[..., 0] for v in call.vs]
    for a, b in zip(call.run(), exact):
        assert all(map(same_bits, a, b))


def test_float64_goes_to_the_reference(kernels: ModuleType) -> None:
    for weight_dtype, dtype in ((torch.float64, torch.float64), (torch.float64, torch.float32), (torch.float32,) * 2):
        op = conv(5, 4, (3,), (7,))
        call = Call.of(LinearOperator(op.weight.to(weight_dtype), op.geometry), matrix(3, 4))
        if weight_dtype == torch.float32:
            dtype = torch.float64
        call.us[0], call.vs[0] = call.us[0].to(dtype), call.vs[0].to(dtype)
        for found, wanted in zip(call.run(), call.by_reference()):
            assert all(map(same_bits, found, wanted))


# -- what is hard on a norm -------------------------------------------------------------------------------------------


def mixture_of_all_kinds(scale: float = 1.0) -> list[LinearOperator]:
    names = ("gemm64", "gemm16", "direct", "depthwise", "grouped", "matrix")
    return [LinearOperator(op.weight * scale, op.geometry) for op in (CHOSEN[name]() for name in names)]


@pytest.mark.parametrize("scale", [1e-40, 1e-38, 1e-30, 1e-10, 1e10, 1e30])
def test_scales_of_weights(kernels: ModuleType, scale: float) -> None:
    Call.of(*mixture_of_all_kinds(scale)).check()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_scales_of_start_vectors(kernels: ModuleType, scale: float) -> None:
    call = Call.of(*mixture_of_all_kinds())
    call.us, call.vs = [u * scale for u in call.us], [v * scale for v in call.vs]
    call.check()


@pytest.mark.parametrize("precision", ops.PRECISIONS)
def test_zero_weights_keep_the_vectors(kernels: ModuleType, precision: str) -> None:
    chosen = mixture_of_all_kinds(0.0)
    call = Call.of(*chosen, matrix(5, 6))
    for n_iterations in (1, 3):
        us, vs, sigmas, groups = call.run(n_iterations, precision)
        for i in range(len(chosen)):
            assert same_bits(us[i], call.us[i])
            assert same_bits(vs[i], call.vs[i])
            assert sigmas[i] == 0
            assert groups[i] == 0
        assert sigmas[-1] > 0


def test_zero_start_vectors_stay(kernels: ModuleType) -> None:
    """A v = 0: then u is kept as given, and the iteration goes on from it."""
    call = Call.of(*mixture_of_all_kinds())
    call.vs = [torch.zeros_like(v) for v in call.vs]
    call.check(1)
    call.check(2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_weights_that_are_not_finite(kernels: ModuleType, value: float, precision: str) -> None:
    chosen = mixture_of_all_kinds()
    for op in chosen:
        op.weight.view(-1)[7] = value
    call = Call.of(*chosen, matrix(5, 6))
    us, vs, sigmas, groups = call.run(precision=precision)
    wanted = call.by_reference()
    for i, op in enumerate(chosen):
        assert not sigmas[i].isfinite()
        assert not wanted[2][i].isfinite()
        assert math.isinf(value) or sigmas[i].isnan()
        assert groups[i] == wanted[3][i]
        assert us[i].isfinite().all()
        assert vs[i].isfinite().all()
        if op.geometry.groups == 1:
            assert same_bits(us[i], call.us[i])
            assert same_bits(vs[i], call.vs[i])
    assert sigmas[-1].isfinite()


@pytest.mark.parametrize("groups", [2, 9, 40])
def test_groups_are_independent(kernels: ModuleType, groups: int) -> None:
    """One group is zero, one has the largest norm, and one is not finite."""
    for top in {0, 1, groups // 2, groups - 1}:
        weight = torch.randn(groups, 2, 2, 3)
        weight[top] *= 50
        dead = (top + 1) % groups
        weight[dead] = 0
        op = ConvOperator(weight.flatten(0, 1), (7,), padding=1, groups=groups)
        call = Call.of(op)
        us, vs, _, tops = call.check()
        assert tops[0] == top
        rows = slice(2 * dead, 2 * dead + 2)
        assert same_bits(us[0][rows], call.us[0][rows])
        assert same_bits(vs[0][rows], call.vs[0][rows])
        op.weight[4 * top // 2, 0, 0] = math.nan
        us, vs, sigmas, tops = call.run()
        assert sigmas[0].isnan()
        assert tops[0] == top
        rows = slice(2 * top, 2 * top + 2)
        assert same_bits(us[0][rows], call.us[0][rows])
        assert torch.cat([us[0], vs[0]]).isfinite().all()
    equal = ConvOperator(torch.ones(2 * groups, 2, 3), (7,), padding=1, groups=groups)
    call = Call.of(equal)
    call.vs[0].fill_(1.0)
    assert call.run()[3][0] == 0  # the first of equals


@pytest.mark.parametrize("value", [3.0, math.nan])
@pytest.mark.parametrize("first", [1, 9, 15])
def test_the_first_of_equal_groups_is_the_top(kernels: ModuleType, value: float, first: int) -> None:
    weight = torch.ones(40, 2, 3)
    weight[[first, 16, 24, 33]] = value
    call = Call.of(ConvOperator(weight, (7,), padding=1, groups=40))
    call.vs[0].fill_(1.0)
    (sigma,), (top,) = call.run()[2:]
    assert top == first == call.by_reference()[3][0]
    assert sigma.isnan() == math.isnan(value)


def test_matrices_do_not_read_what_they_were_given_of_the_result(kernels: ModuleType) -> None:
    for op, unused in ((matrix(20, 30), "vs"), (CHOSEN["gemm64"](), "us"), (CHOSEN["depthwise"](), "us")):
        call = Call.of(op)
        wanted = call.run()
        getattr(call, unused)[0].fill_(math.nan)
        assert all(same_bits(a[0], b[0]) for a, b in zip(call.run(), wanted))


# -- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("precision", ops.PRECISIONS)
def test_same_bits_in_every_thread_order_and_on_repeat(kernels: ModuleType, split: bool, precision: str) -> None:
    names = [name for name in CHOSEN if not name.endswith("_split") and "slots_" not in name]
    if precision != "fp32":
        names = ["stride", "gemm16"]
    call = Call.of(*(CHOSEN[name]() for name in names))
    results = []
    with planning(split=split):
        for order in (*THREAD_ORDERS, THREAD_ORDERS[-1]):
            kernels.set_thread_order(order)
            results.append([t for part in call.run(precision=precision) for t in part])
    for again in results[1:]:
        assert all(map(same_bits, again, results[0]))


def test_nothing_given_is_written_to(kernels: ModuleType) -> None:
    call = Call.of(*mixture_of_all_kinds(), *mixture_of_all_kinds(0.0))
    before = [t.clone() for t in (*call.weights, *call.us, *call.vs)]
    versions = [t._version for t in (*call.weights, *call.us, *call.vs)]
    found = call.run(2)
    assert all(map(same_bits, (*call.weights, *call.us, *call.vs), before))
    assert [t._version for t in (*call.weights, *call.us, *call.vs)] == versions
    given = {t.untyped_storage().data_ptr() for t in (*call.us, *call.vs)}
    assert given.isdisjoint(t.untyped_storage().data_ptr() for part in found for t in part)


# -- plans ------------------------------------------------------------------------------------------------------------


def check_plan(call: Call, parallel: int = 9) -> None:
    """Every result is computed once, from all channels, in parts that do not share memory."""
    plan = plan_of(call, parallel)
    counters: set[int] = set()
    for half, (gathers, units) in enumerate(zip(gathers_of(plan), units_of(plan))):
        norms: set[int] = set()
        partials: list[tuple[int, int]] = []
        for op, g in enumerate(gathers):
            mine = units[units["gather"] == op]
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
    assert counters == set(range(plan.n_counters))
    assert plan.partial_size <= sum(plan.result_sizes)


@settings(properties, max_examples=60)
@given(mixture=st.lists(operators(), min_size=1, max_size=4), parallel=st.sampled_from([1, 9, 400]))
def test_plans_cover_all_work_once(mixture: list[LinearOperator], parallel: int) -> None:
    check_plan(Call.of(*mixture), parallel)


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("parallel", [3 * 132, 3])
def test_plan_of_resnet18(reduced: bool, parallel: int) -> None:
    chosen: list[LinearOperator] = [conv(64, 3, (3, 3), (32, 32), padding=1)]
    for width, size in ((64, 32), (128, 16), (256, 8), (512, 4)):
        before = max(64, width // 2)
        chosen += [conv(width, width, (3, 3), (size, size), padding=1)] * (4 if width == 64 else 3)
        if width > 64:
            chosen.append(conv(width, before, (3, 3), (2 * size, 2 * size), padding=1, stride=2))
            chosen.append(conv(width, before, (1, 1), (2 * size, 2 * size), stride=2))
    chosen = [op.reduced() if reduced else op for op in (*chosen, matrix(10, 512))]
    call = Call.of(*chosen)
    check_plan(call, parallel)
    for units in units_of(plan_of(call, parallel)):
        assert parallel == 3 or (units["splits"] > 1).any()


def test_plans_of_long_sums_do_not_overflow() -> None:
    """12 million columns times hundreds of parts is more than 2^31."""
    layout = Layout(Geometry(), 16, 12_000_000, 12_000_000, 1, 0, 0)
    plan = plan_from([layout], parallel=396)
    for units, channels in zip(units_of(plan), (16, 12_000_000)):
        assert (units["channel"] < units["channel_end"]).all()
        assert units["channel_end"].max() == channels
    assert len(units_of(plan)[1]) > 100


# -- the operator -----------------------------------------------------------------------------------------------------


def small_call() -> Call:
    return Call.of(matrix(3, 5), line(9, 3, 5), matrix(7, 3), conv(4, 4, (3,), (5,), groups=4))


@pytest.mark.parametrize("n_iterations", [1, 2])
def test_operator_passes_opcheck(kernels: ModuleType, n_iterations: int) -> None:
    call = small_call()
    torch.library.opcheck(ops._power_step, (call.weights, call.us, call.vs, call.code, n_iterations, "fp32"))


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.filterwarnings("error:.*may not alias.*:UserWarning")
def test_compile(kernels: ModuleType, computed: bool) -> None:
    """Also with operands that the compiled code computes itself: it then counts on results aligned to 16 bytes."""
    call = small_call()

    def advance(weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
        if computed:
            weights, us, vs = ([x * 2 for x in xs] for xs in (weights, us, vs))
        u, v, sigma, _ = ops.power_step(weights, us, vs, call.code, 1, "fp32")
        return [x * 2 for x in (*u, *v, *sigma)]

    torch._dynamo.reset()
    found = torch.compile(advance, fullgraph=True)(call.weights, call.us, call.vs)
    assert all(map(same_bits, found, advance(call.weights, call.us, call.vs)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"precision": "fp8"}, r"precision='fp8' is unknown; choose one of fp32, tf32, 3xtf32, bf16"),
        ({"us": [torch.zeros(3), torch.zeros(9, 5), torch.zeros(7), torch.zeros(4, 2)]}, r"u has shape \(4, 2\)"),
        ({"vs": [torch.zeros(5), torch.zeros(3, 6), torch.zeros(3), torch.zeros(4, 5)]}, r"v has shape \(3, 6\)"),
        ({"us": [torch.zeros(3)]}, "1 vectors u for 4 weights"),
        ({"vs": []}, "0 vectors v for 4 weights"),
        ({"n_iterations": 0}, "n_iterations=0 must be >= 1"),
        ({"weights": [torch.zeros(3, 5)]}, "1 weights for 4 geometries"),
        ({"geometry": Geometry().encode()}, "4 weights for 1 geometries"),
        ({"weights": [torch.zeros(3, 5)] * 4}, r"a weight of shape \(3, 5\) does not fit its geometry"),
    ],
)
def test_what_the_operator_refuses(kernels: ModuleType, change: dict[str, Any], says: str) -> None:
    call = small_call()
    args = {"weights": call.weights, "us": call.us, "vs": call.vs, "geometry": call.code}
    args |= {"n_iterations": 1, "precision": "fp32"} | change
    with pytest.raises(ValueError, match=says):
        ops.power_step(*(args[name] for name in ("weights", "us", "vs", "geometry", "n_iterations", "precision")))


@pytest.mark.parametrize("names", [["us"], ["vs"], ["weights"], ["us", "vs", "weights"]])
def test_every_tensor_must_be_on_one_device(kernels: ModuleType, names: list[str]) -> None:
    call = small_call()
    tensors = {"weights": call.weights, "us": call.us, "vs": call.vs}
    for name in names:
        tensors[name] = [*tensors[name][:2], tensors[name][2].to("meta"), *tensors[name][3:]]
    says = {"us": "u is on meta", "vs": "v is on meta"}.get("".join(names), r"weights are on .* and on meta")
    with pytest.raises(ValueError, match=says):
        ops._power_step_kernel(kernels, *tensors.values(), call.code, 1, "fp32")
