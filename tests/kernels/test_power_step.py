"""The kernels of grouped power iteration, on the CPU, against the reference in float64."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sn_fast import ConvOperator
from sn_fast.layers import LayerOperator
from sn_fast.ops import power_step as ops
from sn_fast.reference.geometry import Axis, Geometry

from ..attacks.models import same_bits
from .accuracy import UNIT_ROUNDOFF
from .conftest import THREAD_ORDERS
from .power_steps import CHOSEN, Call, check_precision, maps_of, operators, plan_of, planning
from .small_operators import conv, drawn, line, matrix


@drawn(200)
@given(
    mixture=st.lists(operators(), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    order=st.sampled_from(THREAD_ORDERS),
    split=st.booleans(),
)
def test_every_geometry(kernels: ModuleType, mixture: list[LayerOperator], seed: int, order: int, split: bool) -> None:
    kernels.set_thread_order(order)
    with planning(split=split):
        Call.of(*mixture, seed=seed).check()


@drawn(60)
@given(
    op=operators(300_000),
    order=st.sampled_from(THREAD_ORDERS),
    narrow=st.booleans(),
    split=st.booleans(),
    precision=st.sampled_from(["tf32", "3xtf32", "bf16"]),
)
def test_every_geometry_in_every_precision(
    kernels: ModuleType, op: LayerOperator, order: int, narrow: bool, split: bool, precision: str
) -> None:
    kernels.set_thread_order(order)
    with planning(split=split, _DIRECT_MOST_ROWS=0, _NARROW_COST=0.1 if narrow else 1e9):
        check_precision(op, precision)


@drawn(40)
@given(data=st.data(), seed=st.integers(0, 2**31), split=st.booleans())
def test_paddings_wider_than_the_kernel(kernels: ModuleType, data: st.DataObject, seed: int, split: bool) -> None:
    """In the adjoint a border that is repeated is read through as many slots: hundreds, of few channels."""
    mode = data.draw(st.sampled_from(["replicate", "replicate", "circular"]))
    axes = data.draw(st.integers(1, 2))
    widest = {1: 300, 2: 12}[axes]
    size = [data.draw(st.integers(1, 3) if mode == "replicate" else st.integers(8, widest)) for _ in range(axes)]
    kernel = [data.draw(st.integers(1, 3)) for _ in range(axes)]
    pads = [
        tuple(data.draw(st.integers(n // 2, n)) for _ in range(2))
        for n in (widest if mode == "replicate" else s for s in size)
    ]
    groups, per_group = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 3))
    weight = torch.randn(2 * groups, per_group, *kernel, generator=torch.Generator().manual_seed(seed))
    op = ConvOperator(weight, size, padding=pads, groups=groups, padding_mode=mode)
    call = Call.of(op, seed=seed)
    with planning(split=split):
        # Terms that are alike are rounded alike, up to half a unit each: in sums of 16, and in the sum of those.
        products = max(int(g["slots"].prod() * g["channels"].max()) for g in maps_of(plan_of(call)))
        call.check(cuts=(16 + products / 16) / 2 * UNIT_ROUNDOFF)


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
        dense = LayerOperator(op.weight.double(), op.geometry).to_dense()
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
    third = LayerOperator(torch.randn(15, 2, 4), Geometry((Axis(1, 1, 4, 4, 1, 2),)))
    call = Call.of(nothing, nothing.reduced(), third, ConvOperator(third.weight, (1,), padding=((2, 1),)))
    found = call.check()
    assert found[2][0] == 0
    assert torch.equal(found[0][0], call.us[0])
    assert torch.equal(found[1][0], call.vs[0])


# -- what is hard on a norm -------------------------------------------------------------------------------------------


def mixture_of_all_kinds(scale: float = 1.0) -> list[LayerOperator]:
    names = ("gemm64", "gemm16", "direct", "depthwise", "grouped", "matrix")
    return [LayerOperator(op.weight * scale, op.geometry) for op in (CHOSEN[name]() for name in names)]


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


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize(("size", "kernel"), [((1, 1), 3), ((2, 5), 5), ((1, 4), 3)])
def test_a_weight_that_reads_padding_alone_is_no_part_of_the_map(
    kernels: ModuleType, value: float, rows: int, size: tuple[int, int], kernel: int
) -> None:
    op = ConvOperator(torch.randn(rows, 5, kernel, kernel), size, padding=kernel // 2)
    op.weight[:, :, 0] = 0.0  # reads above the first row
    without = Call.of(op).run()
    op.weight[1, 2, 0, kernel // 2] = value
    found = Call.of(op).run()
    assert all(map(same_bits, (t for part in found for t in part), (t for part in without for t in part)))
    op.weight[1, 2, kernel // 2, kernel // 2] = value
    assert not Call.of(op).run()[2][0].isfinite()


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
