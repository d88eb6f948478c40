"""The kernels of normalisation's gradient, on the CPU, against the reference."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sn_fast import MatrixOperator
from sn_fast.layers import LayerOperator
from sn_fast.ops.power_step import PRECISIONS

from ..layers.geometries import Case, cases
from .conftest import THREAD_ORDERS
from .small_operators import DTYPES, conv, drawn, line, matrix
from .weight_gradients import CHOSEN, INF, NAN, Call, above, calls, parts, plan_of, same


@drawn(150)
@given(call=calls(), order=st.sampled_from(THREAD_ORDERS), n=st.sampled_from([None, 1, 2, 3, 5]))
def test_every_geometry(kernels: ModuleType, call: Call, order: int, n: int | None) -> None:
    kernels.set_thread_order(order)
    if n is None:
        call.check()
    else:
        with parts(n):
            call.check()


@drawn(60)
@given(
    call=calls(),
    order=st.sampled_from(THREAD_ORDERS),
    n=st.sampled_from([1, 1, 3]),
    precision=st.sampled_from(["tf32", "3xtf32", "bf16"]),
)
def test_every_geometry_in_every_precision(kernels: ModuleType, call: Call, order: int, n: int, precision: str) -> None:
    kernels.set_thread_order(order)
    with parts(n):
        call.check(precision, 4.0 if precision == "3xtf32" else 2.0)


@drawn(40)
@given(case=cases(), cap=st.booleans(), seed=st.integers(0, 2**31))
def test_it_is_the_derivative_of_pytorchs_own_layer(kernels: ModuleType, case: Case, cap: bool, seed: int) -> None:
    """W / (<u, A(W) v> / beta), u and v constant, through PyTorch's convolution in float64."""
    op = case.operator(torch.float32)
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(shape, generator=generator) for shape in (op.out_shape, op.in_shape))
    group = seed % case.groups
    weight = op.weight.double().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "weight", lambda self, dtype=None: weight)
        image = case.by_torch(v.double()[None])[0]
    sigma = (image * u).reshape(case.groups, -1)[group].sum()
    sign = sigma.detach().sign()
    assume(float(sigma.detach().abs()) > 0.1)
    u, sigma = u * sign.float(), sigma * sign  # sigma is positive
    beta = float(sigma.detach()) / 3
    grad = torch.randn(op.weight.shape, generator=generator)
    (exact,) = torch.autograd.grad((weight / (sigma / beta) * grad).sum(), weight)
    top = torch.tensor(group) if case.groups > 1 else None
    found = Call(op, grad, u, v, sigma.detach().float(), top, beta, cap).run()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * float(grad.abs().max()))


# -- edges of tiles, parts, precisions --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_layers(ordered_kernels: ModuleType, name: str) -> None:
    op = CHOSEN[name]()
    for group in sorted({0, op.geometry.groups // 2, op.geometry.groups - 1}):
        call = Call.of(op, group=group)
        for n in (None, 1, 3):
            with parts(n) if n else pytest.MonkeyPatch.context():
                call.check()


@pytest.mark.parametrize("weight_dtype", DTYPES)
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_dtypes(kernels: ModuleType, weight_dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    for name in ("conv", "grouped", "matrix"):
        op = CHOSEN[name]()
        Call.of(LayerOperator(op.weight.to(weight_dtype), op.geometry), grad_dtype=grad_dtype).check()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [n for n in CHOSEN if n not in ("long_grouped_sum", "depthwise", "grouped")])
def test_precisions(rounding_kernels: ModuleType, name: str, precision: str, n: int) -> None:
    with parts(n):
        Call.of(CHOSEN[name]()).check(precision, 4.0 if precision == "3xtf32" else 2.0)


def test_lower_precision_is_lower(rounding_kernels: ModuleType) -> None:
    """The precisions do what their names say: the error is that of rounding the operands."""
    call = Call.of(CHOSEN["long_sum"]())
    call.grad = call.op.weight.clone()  # the inner product is large
    exact = call.by_reference(torch.float64)
    plain = call.grad / (float(call.sigma) / call.beta)
    errors = [float((call.run(p) - exact).norm() / (exact - plain).norm()) for p in ("fp32", "3xtf32", "tf32", "bf16")]
    assert errors[0] < 5e-7
    assert errors[1] < 2e-6
    assert 1e-5 < errors[2] < 1e-3
    assert 1e-4 < errors[3] < 1e-2


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "3xtf32"])
def test_edges_of_tiles(kernels: ModuleType, precision: str, n: int) -> None:
    factor = 4.0 if precision == "3xtf32" else 2.0
    with parts(n):
        for rows in (1, 15, 16, 63, 64, 65, 127, 128, 129):
            Call.of(line(rows, 3, 1 + rows % 19)).check(precision, factor)
        for positions in (1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49):
            Call.of(line(5, 3, positions)).check(precision, factor)
        kernels_of = {63: (1, 3, 63), 64: (1, 2, 64), 65: (1, 5, 65), 127: (1,), 129: (3,)}  # by (channel, tap) pairs
        for channels, kernel in ((pairs // k, k) for pairs, ks in kernels_of.items() for k in ks):
            Call.of(line(7, channels, 9, kernel)).check(precision, factor)


def test_long_sums_are_split_into_parts_of_64_positions_at_least(kernels: ModuleType) -> None:
    split = {name: plan_of(CHOSEN[name]()).sizes[-1] for name in CHOSEN}
    assert split["long_sum"] > 1
    assert split["long_grouped_sum"] > 1
    assert split["long_line"] > 1
    assert split["long_whole_tiles"] > 1
    assert split["matrix"] == split["many_tiles"] == split["conv"] == 1
    assert plan_of(line(3, 2, 128), budget=1 << 30).sizes[-1] == 2
    assert plan_of(line(3, 2, 129), budget=1 << 30).sizes[-1] == 3
    assert plan_of(line(3, 2, 64), budget=1 << 30).sizes[-1] == 1


@pytest.mark.parametrize("name", CHOSEN)
def test_plans_keep_to_the_device_and_the_budget(name: str) -> None:
    op = CHOSEN[name]()
    for parallel in (1, 5, 9, 400):
        for budget in (0, 5000, 100_000, 1 << 30):
            plan = plan_of(op, parallel, budget)
            groups, rows, columns, taps, n = plan.sizes
            tiles = math.ceil(rows / 64) * math.ceil(columns * taps / 64)
            assert groups * rows * columns * taps == op.weight.numel()
            assert 1 <= n <= max(1, parallel // tiles)
            assert groups == 1 or n <= 16
            assert plan.partial_size <= budget
            assert (plan.partial_size, plan.n_counters) == ((tiles * n * 64 * 64, tiles) if n > 1 else (0, 0))


def test_more_parts_than_positions(ordered_kernels: ModuleType) -> None:
    with parts(7):
        Call.of(line(5, 3, 3)).check()
        Call.of(matrix(5, 3)).check()
        Call.of(conv(6, 6, (3,), (2,), padding=1, groups=3), group=1).check()


# -- sigma, groups, the inner product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_flows_where_nothing_is_cut(kernels: ModuleType, dtype: torch.dtype) -> None:
    chosen = [*((s, b, True) for s, b in ((0.3, 0.5), (0.5, 0.5), (9.0, INF), (0.0, 0.5))), (0.0, 0.5, False)]
    for name in ("conv", "grouped", "matrix", "long_sum"):
        for sigma, beta, cap in chosen:
            call = Call.of(CHOSEN[name](), sigma=sigma, beta=beta, cap=cap, grad_dtype=dtype)
            assert same(call.run(), call.grad)


def test_something_flows_right_above_beta(kernels: ModuleType) -> None:
    for name in ("conv", "long_sum"):
        op = CHOSEN[name]()
        call = Call.of(op, sigma=above(0.5))
        call.grad = op.weight.clone()
        assert not torch.allclose(call.check(), call.grad, atol=1e-3)
        Call.of(op, sigma=0.3, cap=False).check()  # "scale" cuts there too


@pytest.mark.parametrize("sigma", [NAN, INF])
@pytest.mark.parametrize("cap", [True, False])
def test_sigma_that_is_not_finite(kernels: ModuleType, sigma: float, cap: bool) -> None:
    call = Call.of(CHOSEN["conv"](), sigma=sigma, cap=cap)
    torch.testing.assert_close(call.run(), call.by_reference(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-8, 1e8, 1e30])
def test_scales_of_weights(kernels: ModuleType, scale: float) -> None:
    """sigma and beta go with the weight, as they do where a weight is small or large."""
    for name in ("conv", "matrix", "long_sum"):
        op = CHOSEN[name]()
        call = Call.of(LayerOperator(op.weight * scale, op.geometry), sigma=1.7 * scale, beta=0.5 * scale)
        call.check()


def test_the_inner_product_is_not_rounded_on_the_way(kernels: ModuleType) -> None:
    """It cancels to a millionth of its terms; in float32 nothing would be left of it."""
    op = matrix(64, 66)
    call = Call.of(op)
    call.grad = torch.randn_like(op.weight)
    call.grad *= 1e4
    inner = float((call.grad.double() * op.weight.double()).sum())
    call.grad -= inner * op.weight / float(op.weight.double().square().sum())
    inner = float((call.grad.double() * op.weight.double()).sum())
    call.grad = call.grad + op.weight * (10.0 - inner) / float(op.weight.double().square().sum())
    u, v = torch.zeros(64), torch.zeros(66)
    u[3], v[5] = 1e6, 1.0
    call.u, call.v = u, v
    exact, found = call.by_reference(torch.float64), call.run()
    assert abs(float(found[3, 5] / exact[3, 5]) - 1) < 1e-6


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", [n for n in CHOSEN if "group" in n or "depthwise" in n])
def test_every_top_group(kernels: ModuleType, name: str, n: int) -> None:
    """Groups that do not attain sigma get the gradient over the divisor, bit by bit."""
    op = CHOSEN[name]()
    groups = op.geometry.groups
    with parts(n):
        for top in range(0, groups, max(1, groups // 5)):
            call = Call.of(op, group=top)
            found = call.check().reshape(groups, -1)
            divided = (call.grad / (call.sigma / call.beta)).reshape(groups, -1)
            others = [g for g in range(groups) if g != top]
            assert same(found[others], divided[others])
            assert not same(found[top], divided[top])


@pytest.mark.parametrize("name", ["grouped", "long_grouped_sum"])
def test_no_top_group_means_all_groups(ordered_kernels: ModuleType, name: str) -> None:
    call = Call.of(CHOSEN[name]())
    call.group = None
    call.check()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_top_group_of_any_integer_type(kernels: ModuleType, dtype: torch.dtype) -> None:
    call = Call.of(CHOSEN["grouped"](), group=1)
    exact = call.run()
    call.group = torch.tensor([1, 0], dtype=dtype)[:1]
    assert same(call.run(), exact)


LENGTHS = (1, 3, 4, 5, 1023, 1024, 1025, 4095, 4096, 4097, 8193)


@pytest.mark.parametrize("shape", [*((n, 1) for n in LENGTHS), (1027, 1025)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inner_products_lose_no_element(kernels: ModuleType, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """At the ends of the vectors, of the blocks and of the grid; counted, so that float32 could not hold the sum."""
    if shape[1] > 1 and dtype == torch.float16:
        return  # slow, and nothing new
    weight = torch.ones(shape, dtype=dtype)
    count = weight.numel()
    call = Call.of(MatrixOperator(weight), sigma=float(2**24), beta=float(2**24) * 0.5, grad_dtype=torch.float32)
    call.grad = torch.full(shape, 2.0**24 + 2)
    call.u, call.v = torch.zeros(shape[0]), torch.zeros(shape[1])
    call.u[0] = call.v[0] = 1.0
    wanted = (2**24 + 2 - count * (2**24 + 2) / 2**24) / 2
    assert float(call.run()[0, 0]) == float(torch.tensor(wanted))
    assert same(call.run().flatten()[1:], call.grad.flatten()[1:] / 2)


def test_blocks_of_inner_products(module: ModuleType) -> None:
    counts = [1, 4096, 4097, 8193, 256 * 4096, 256 * 4096 + 1, 2**31 - 1, 2**40]
    assert [module.normalize_backward_blocks(n) for n in counts] == [1, 1, 2, 3, 256, 256, 256, 256]


def test_same_bits_in_every_thread_order(kernels: ModuleType) -> None:
    for name in ("long_sum", "long_grouped_sum", "many_tiles", "matrix", "grouped"):
        call = Call.of(CHOSEN[name](), grad_dtype=torch.float32)
        results = []
        for order in (*THREAD_ORDERS, *THREAD_ORDERS):
            kernels.set_thread_order(order)
            results.append(call.run())
        assert all(same(r, results[0]) for r in results)


def test_parts_change_the_last_bits_only(kernels: ModuleType) -> None:
    call = Call.of(CHOSEN["long_sum"]())
    results = []
    for n in (1, 4):
        with parts(n):
            results.append(call.run())
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
