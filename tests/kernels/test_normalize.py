"""The kernels of normalisation and its gradient, on the CPU, against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sn_fast import ConvOperator, LinearOperator, MatrixOperator
from sn_fast.ops import normalize as ops
from sn_fast.ops.plan import GradientPlan, Layout
from sn_fast.ops.power_step import PRECISIONS
from sn_fast.reference import normalize as reference

from ..on_device import DEVICE
from ..operators.geometries import Case, cases
from .conftest import THREAD_ORDERS
from .power_steps import UNIT_ROUNDOFF, judge

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INF, NAN = math.inf, math.nan
properties = settings(suppress_health_check=list(HealthCheck), deadline=None)


# -- the normalised weight --------------------------------------------------------------------------------------------


def expected(weight: Tensor, sigma: float, beta: float, cap: bool) -> Tensor:
    """In float32: one division for the divisor, one per element."""
    ratio = torch.tensor(sigma) / torch.tensor(beta)
    divisor = torch.ones(()) if (cap and ratio <= 1) or (not cap and sigma == 0) else ratio
    return (weight.float() / divisor).to(weight.dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, but any NaN is as good as any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    bits = a.contiguous().view(integer) == b.contiguous().view(integer)
    return bool((bits | (a.isnan() & b.isnan())).all())


def check_normalize(
    weights: Sequence[Tensor], sigmas: Sequence[float], betas: Sequence[float], caps: Sequence[bool]
) -> list[Tensor]:
    before = [w.clone() for w in weights]
    tensors = [torch.tensor(s) for s in sigmas]
    found = torch.ops.sn_fast.normalize(list(weights), tensors, list(betas), list(caps))
    assert len(found) == len(weights)
    for w, old, s, beta, cap, result in zip(weights, before, sigmas, betas, caps, found):
        assert same(w, old)
        assert same(result, expected(w, s, beta, cap))
        if DEVICE.type == "cpu":  # on a GPU, PyTorch divides sigma by beta through a reciprocal
            assert same(result, reference.normalize(w, torch.tensor(s), beta, cap))
        assert result.stride() == torch.empty_like(w).stride()
    return found


def above(x: float) -> float:
    """The next float32."""
    return float(torch.nextafter(torch.tensor(x), torch.tensor(INF)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sigma_below_at_and_above_beta(kernels: ModuleType, dtype: torch.dtype) -> None:
    weight = torch.randn(37, 29).to(dtype)
    pairs = [
        *((s, b) for b in (0.3, 0.7, 1.0, 3.0) for s in (b / 3, -above(-b), b, above(b), above(above(b)), 50 * b)),
        *((s, b) for b in (0.7, INF) for s in (0.0, 1e-45, 1e-38, 1e38, INF, NAN)),
        *((s, b) for b in (1e-30, 1e30) for s in (1e-30, 1.0, 1e30)),
    ]
    for cap in (True, False):
        usable = [(s, b) for s, b in pairs if cap or b < INF]
        check_normalize([weight] * len(usable), *zip(*usable), [cap] * len(usable))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_cut_keeps_every_bit(kernels: ModuleType, dtype: torch.dtype) -> None:
    weight = torch.randn(50, 90).to(dtype)
    for sigma, beta, cap in ((0.5, 0.7, True), (0.7, 0.7, True), (5.0, INF, True), (0.0, 0.7, True), (0.0, 0.7, False)):
        assert same(check_normalize([weight], [sigma], [beta], [cap])[0], weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_elements(kernels: ModuleType, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    special = [0.0, -0.0, INF, -INF, NAN, info.max, -info.max, info.tiny, info.tiny / 2, info.tiny * info.eps]
    weight = torch.tensor(special, dtype=dtype).repeat(900)
    for sigma in (0.5, 1.7, 1e-3, INF):
        for cap in (True, False):
            check_normalize([weight], [sigma], [0.7], [cap])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Around the ends of vectors and blocks, in one launch and each alone."""
    sizes = (1, 2, 3, 4, 5, 7, 8, 9, 4095, 4096, 4097, 8191, 8192, 8193, 12289, 16384)
    weights = [torch.randn(n, 1).to(dtype) for n in sizes]
    sigmas = [1.0 + 0.1 * i for i in range(len(sizes))]
    check_normalize(weights, sigmas, [0.7] * len(sizes), [True] * len(sizes))
    for weight in weights:
        check_normalize([weight], [1.3], [0.7], [False])


@pytest.mark.parametrize("dtype", DTYPES)
def test_offsets_of_storage(kernels: ModuleType, dtype: torch.dtype) -> None:
    memory = torch.randn(20000).to(dtype)
    for offset in range(1, 10):
        for count in (5, 4096, 8192 + offset):
            check_normalize([memory[offset : offset + count].reshape(-1, 1)], [1.3], [0.7], [True])


@pytest.mark.parametrize("n", [75, 76, 77, 152, 153])
def test_more_weights_than_one_launch_takes(kernels: ModuleType, n: int) -> None:
    """Each with its own sigma, beta, mode, dtype and number of blocks."""
    weights = [torch.randn(1 + 1000 * (i % 7 == 0) * (i % 5), 1 + i % 11).to(DTYPES[i % 3]) for i in range(n)]
    sigmas, betas = [0.5 + 0.1 * i for i in range(n)], [0.3 + 0.2 * (i % 9) for i in range(n)]
    check_normalize(weights, sigmas, betas, [i % 4 > 0 for i in range(n)])


def test_a_large_weight_among_small_ones(kernels: ModuleType) -> None:
    weights = [torch.randn(2, 2), torch.randn(0, 3), torch.randn(500, 301), torch.randn(1, 1), torch.randn(0, 3)]
    check_normalize(weights, [1.0, 2.0, 3.0, 4.0, 5.0], [0.5] * 5, [True, True, False, True, True])


def test_no_weights(kernels: ModuleType) -> None:
    assert list(torch.ops.sn_fast.normalize([], [], [], [])) == []


def views(dtype: torch.dtype) -> list[Tensor]:
    """Dense and not, each laid out in another way."""
    kernel = torch.randn(6, 8, 3, 2).to(dtype)
    volume = torch.randn(4, 3, 2, 5, 3).to(dtype)
    matrix = torch.randn(70, 90).to(dtype)
    return [
        kernel.contiguous(memory_format=torch.channels_last),
        volume.contiguous(memory_format=torch.channels_last_3d),
        matrix.T,
        kernel.permute(2, 0, 3, 1),
        kernel.transpose(0, 1),
        matrix[:, 3:80],
        matrix[::2],
        matrix.T[::3],
        matrix[:, ::2].T,
        kernel.contiguous(memory_format=torch.channels_last)[:, :5],
        kernel[..., :1],
        matrix[:1].expand(70, 90),
        matrix[:, :1].expand(70, 90),
        matrix[0, 0].expand(70, 90),
        matrix.as_strided((40, 40), (1, 1)),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_weights(kernels: ModuleType, dtype: torch.dtype) -> None:
    weights = views(dtype)
    check_normalize(weights, [1.3] * len(weights), [0.7] * len(weights), [True] * len(weights))
    for weight in weights:
        check_normalize([weight], [0.3], [0.7], [True])


def test_float64_goes_to_the_reference(kernels: ModuleType) -> None:
    """Also among others, and where sigma alone is float64."""
    weights = [torch.randn(5, 6, dtype=d) for d in (torch.float32, torch.float64, torch.float16, torch.float32)]
    sigmas = [torch.tensor(1.3, dtype=d) for d in (torch.float32, torch.float64, torch.float32, torch.float64)]
    found = torch.ops.sn_fast.normalize(weights, sigmas, [0.7] * 4, [True] * 4)
    for result, wanted in zip(found, reference.normalize_all(weights, sigmas, [0.7] * 4, [True] * 4)):
        assert same(result, wanted)


@settings(properties, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    order=st.sampled_from(THREAD_ORDERS),
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    values=st.lists(st.floats(0.0, 2.0**100, width=32), min_size=12, max_size=12),
    cap=st.booleans(),
)
def test_any_weights(
    kernels: ModuleType, seed: int, order: int, sizes: list[int], values: list[float], cap: bool
) -> None:
    kernels.set_thread_order(order)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, 1, generator=generator).to(DTYPES[(seed + n) % 3]) for n in sizes]
    betas = [max(b, 1e-30) for b in values[6:]]
    check_normalize(weights, values[: len(sizes)], betas[: len(sizes)], [cap] * len(sizes))


# -- the gradient: calls and their judge ------------------------------------------------------------------------------


@dataclass
class Call:
    """The arguments of one call of normalize_backward."""

    op: LinearOperator
    grad: Tensor
    u: Tensor
    v: Tensor
    sigma: Tensor
    group: Tensor | None
    beta: float
    cap: bool = True

    @staticmethod
    def of(
        op: LinearOperator,
        *,
        sigma: float = 1.7,
        beta: float = 0.5,
        cap: bool = True,
        group: int | None = None,
        grad_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> Call:
        generator = torch.Generator().manual_seed(seed)
        shapes = op.weight.shape, op.out_shape, op.in_shape
        grad, u, v = (torch.randn(shape, generator=generator) for shape in shapes)
        # Unit vectors per group, as they are in use: then both terms of the formula count.
        groups = op.geometry.groups
        u, v = (x / x.norm() * groups**0.5 for x in (u, v))
        top = None if groups == 1 and group is None else torch.tensor(group or 0)
        return Call(op, grad.to(grad_dtype or op.weight.dtype), u, v, torch.tensor(sigma), top, beta, cap)

    @property
    def code(self) -> list[int]:
        return self.op.geometry.encode()

    def run(self, precision: str = "fp32") -> Tensor:
        before = [t.clone() for t in (self.grad, self.op.weight, self.u, self.v, self.sigma)]
        found = torch.ops.sn_fast.normalize_backward(
            self.grad, self.op.weight, self.sigma, self.u, self.v, self.group, self.code, self.beta, self.cap, precision
        )
        assert all(map(same, before, (self.grad, self.op.weight, self.u, self.v, self.sigma)))
        assert found.dtype == self.grad.dtype
        assert found.shape == self.op.weight.shape
        assert found.stride() == torch.empty_like(self.op.weight).stride()
        return found

    def by_reference(self, dtype: torch.dtype | None = None) -> Tensor:
        tensors = self.grad, self.op.weight, self.sigma, self.u, self.v
        operands = [t if dtype is None else t.to(dtype) for t in tensors]
        return reference.normalize_backward(*operands, self.group, self.code, self.beta, self.cap)

    def check(self, precision: str = "fp32", factor: float = 2.0) -> Tensor:
        """The result, which must be about as near to the truth as PyTorch's in float32, in every group."""
        found = self.run(precision)
        u, v = round_operands(precision, self.u, self.v)

        def function(*operands: Tensor) -> list[Tensor]:
            return [reference.normalize_backward(*operands, self.group, self.code, self.beta, self.cap)]

        operands = self.grad, self.op.weight, self.sigma, u, v
        groups = self.op.geometry.groups
        if found.dtype == torch.float32:
            judge([found], function, operands, [groups], factor)
            return found
        # Half precision rounds once, at the end: each element is one of the two neighbours of the truth, or what
        # float32's error makes of it.
        (exact,) = function(*(x.double() for x in operands))
        (single,) = function(*(x.float() for x in operands))
        half_ulp = exact.abs().clamp(min=torch.finfo(found.dtype).smallest_normal) * torch.finfo(found.dtype).eps / 2
        slack = factor * float((single - exact).abs().max()) + 16 * UNIT_ROUNDOFF * float(exact.abs().max())
        assert bool(((found.double() - exact).abs() <= half_ulp * (1 + 1e-6) + slack).all())
        return found


def round_operands(precision: str, *operands: Tensor) -> list[Tensor]:
    """As matrix instructions read them: bf16 to even, tf32 to 10 bits behind the point, ties away from zero."""
    if precision == "bf16":
        return [x.bfloat16().float() for x in operands]
    if precision == "tf32":
        return [((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in operands]
    return list(operands)


def conv(rows: int, columns: int, kernel: Sequence[int], size: Sequence[int], **options: Any) -> ConvOperator:
    return ConvOperator(torch.randn(rows, columns // options.get("groups", 1), *kernel), size, **options)


def matrix(rows: int, columns: int) -> MatrixOperator:
    return MatrixOperator(torch.randn(rows, columns))


def line(rows: int, columns: int, positions: int, kernel: int = 3) -> ConvOperator:
    """A convolution with as many outputs as inputs."""
    return conv(rows, columns, (kernel,), (positions,), padding="same")


def plan_of(op: LinearOperator, parallel: int = 9, budget: int | None = None) -> GradientPlan:
    layout = Layout.of(op.weight, op.geometry)
    assert layout is not None
    budget = math.prod(op.in_shape) + math.prod(op.out_shape) if budget is None else budget
    return GradientPlan(layout, torch.device("cpu"), parallel, budget)


@contextmanager
def parts(n: int) -> Iterator[None]:
    """Every sum over positions in ``n`` parts, however few positions there are."""

    def split(module: ModuleType, layout: Layout, device: torch.device, budget: int) -> GradientPlan:
        plan = GradientPlan(layout, device, 1, budget)
        groups, rows, columns, taps, _ = plan.sizes
        tiles = -(-rows // 64) * -(-columns * taps // 64)
        plan.sizes = groups, rows, columns, taps, n
        plan.partial_size, plan.n_counters = (tiles * n * 64 * 64, tiles) if n > 1 else (0, 0)
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_plan", split)
        yield


# -- the gradient: every geometry -------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Convolutions of every geometry, as they are or reduced, with few or many channels, and matrices."""
    dtype = draw(st.sampled_from(DTYPES))
    if draw(st.integers(0, 7)) == 0:
        rows, columns = (draw(st.sampled_from([1, 2, 7, 16, 17, 33, 70])) for _ in range(2))
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))))
        op: LinearOperator = MatrixOperator(weight.to(dtype))
    else:
        case = draw(cases())
        factors = (draw(st.sampled_from([1, 1, 5, 12])) for _ in range(2))
        case = replace(case, cin=case.cin * next(factors), cout=case.cout * next(factors))
        op = case.operator(dtype)
        if draw(st.booleans()):
            op = op.reduced()
    assume(op.weight.numel() * math.prod(a.out for a in op.geometry.axes) <= 300_000)
    groups = op.geometry.groups
    return Call.of(
        op,
        beta=draw(st.sampled_from([0.5, 0.5, 0.5, 2.5])),
        cap=draw(st.booleans()),
        group=draw(st.integers(0, groups - 1)) if groups > 1 else draw(st.sampled_from([None, 0])),
        grad_dtype=draw(st.sampled_from([dtype, *DTYPES])),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(properties, max_examples=150)
@given(call=calls(), order=st.sampled_from(THREAD_ORDERS), n=st.sampled_from([None, 1, 2, 3, 5]))
def test_every_geometry(kernels: ModuleType, call: Call, order: int, n: int | None) -> None:
    kernels.set_thread_order(order)
    if n is None:
        call.check()
    else:
        with parts(n):
            call.check()


@settings(properties, max_examples=60)
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


@settings(properties, max_examples=40)
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


# -- the gradient: edges of tiles, parts, precisions ------------------------------------------------------------------

CHOSEN: dict[str, Callable[[], LinearOperator]] = {
    "conv": lambda: conv(20, 12, (3, 3), (9, 8), padding=1),
    "stride": lambda: conv(33, 7, (3, 3), (9, 8), stride=2, padding=1),
    "many_tiles": lambda: conv(70, 20, (3, 3), (5, 5), padding=1),
    "long_sum": lambda: conv(8, 6, (3, 3), (40, 33), padding=1),
    "long_grouped_sum": lambda: conv(12, 12, (3, 3), (40, 33), padding=1, groups=3),
    "long_line": lambda: line(3, 2, 4000),
    "long_whole_tiles": lambda: conv(64, 32, (2, 2), (16, 16)),
    "grouped": lambda: conv(96, 40, (3, 3), (5, 5), padding=1, groups=2),
    "depthwise": lambda: conv(48, 48, (3, 3), (7, 7), padding=1, groups=48),
    "depthwise_multiplier": lambda: conv(12, 6, (5,), (9,), padding=2, groups=6, padding_mode="replicate"),
    "transposed": lambda: conv(20, 12, (3, 3), (4, 5), stride=2, padding=1, output_padding=1, transposed=True),
    "transposed_grouped": lambda: conv(12, 12, (3, 2), (4, 5), stride=2, transposed=True, groups=3),
    "3d": lambda: conv(5, 4, (2, 3, 2), (4, 5, 4), stride=(1, 2, 1), padding=1, dilation=(1, 1, 2)),
    "reflect": lambda: conv(5, 4, (3, 3), (5, 6), padding=2, padding_mode="reflect"),
    "circular": lambda: conv(5, 4, (3, 3), (5, 6), padding=2, padding_mode="circular", dilation=2),
    "patch": lambda: conv(20, 3, (4, 4), (16, 16), stride=4).reduced(),
    "whole_input": lambda: conv(20, 3, (4, 4), (4, 4)),
    "point": lambda: conv(40, 30, (1, 1), (6, 6)),
    "reduced_point": lambda: conv(40, 30, (1, 1), (6, 6)).reduced(),
    "matrix": lambda: matrix(70, 130),
    "wide": lambda: matrix(3, 700),
    "tall": lambda: matrix(700, 3),
}


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
        Call.of(LinearOperator(op.weight.to(weight_dtype), op.geometry), grad_dtype=grad_dtype).check()


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [n for n in CHOSEN if n not in ("long_grouped_sum", "depthwise", "grouped")])
def test_precisions(kernels: ModuleType, name: str, precision: str, n: int) -> None:
    with parts(n):
        Call.of(CHOSEN[name]()).check(precision, 4.0 if precision == "3xtf32" else 2.0)


def test_lower_precision_is_lower(kernels: ModuleType) -> None:
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


# -- the gradient: sigma, groups, layouts -----------------------------------------------------------------------------


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
        call = Call.of(LinearOperator(op.weight * scale, op.geometry), sigma=1.7 * scale, beta=0.5 * scale)
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


def unaligned(t: Tensor, offset: int = 1) -> Tensor:
    return torch.empty(t.numel() + offset, dtype=t.dtype)[offset:].reshape(t.shape).copy_(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "unaligned": unaligned,
    "every_other_row": lambda w: torch.stack([w, w], dim=1)[:, 0],
    "every_other_tap": lambda w: torch.stack([w, w], dim=-1)[..., 0],
    "taps_transposed": lambda w: w.mT.contiguous().mT,
    "expanded": lambda w: w[:1].expand(w.shape),
}


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_weight", LAYOUTS)
def test_layouts(kernels: ModuleType, of_weight: str, of_grad: str) -> None:
    for shape, size, options in (
        ((12, 10, 3, 2), (5, 6), {"padding": 1}),
        ((12, 4, 2, 2), (2, 2), {}),  # a matrix, if its columns lie as the input does
        ((12, 3, 2, 2), (5, 5), {"groups": 4}),
    ):
        op = ConvOperator(LAYOUTS[of_weight](torch.randn(shape)), size, **options)  # type: ignore[arg-type]
        call = Call.of(op, group=3 if options.get("groups") else None)
        call.grad = LAYOUTS[of_grad](call.grad)
        call.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_matrices(kernels: ModuleType, dtype: torch.dtype) -> None:
    views = [
        torch.randn(20, 33).T,
        torch.randn(33, 47)[:, 3:23],
        torch.randn(20, 66).T[::2],
        torch.randn(1, 20).expand(33, 20),
        unaligned(torch.randn(33, 20), 3),
    ]
    for view in views:
        weight = torch.empty_strided(view.shape, view.stride(), dtype=dtype).copy_(view) if view.stride(0) else view
        for grad in views:
            call = Call.of(MatrixOperator(weight))
            call.grad = grad.to(dtype)
            call.check()


def test_vectors_of_any_layout(kernels: ModuleType) -> None:
    call = Call.of(CHOSEN["conv"]())
    exact = call.run()
    call.u = call.u.transpose(0, -1).contiguous().transpose(0, -1)
    call.v = torch.stack([call.v, call.v], dim=-1)[..., 0]
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


# -- the operators as such --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Shapes and strides of the fakes are those of the kernels, in every layout."""
    kernel = torch.randn(6, 4, 3, 2).to(dtype)
    laid_out = [kernel, kernel.contiguous(memory_format=torch.channels_last), kernel[:, :, :, :1]]
    laid_out.append(laid_out[1][:, :3])
    sigma = torch.tensor(1.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    n = len(laid_out)
    torch.library.opcheck(
        torch.ops.sn_fast.normalize.default, (laid_out, [sigma] * n, [0.5, 2.0, INF, 0.5], [True, False, True, True])
    )
    for weight in laid_out[:2]:
        op = ConvOperator(weight, (5, 6), padding=1)
        call = Call.of(op)
        u, v = call.u.to(sigma.dtype), call.v.to(sigma.dtype)
        grads = [call.grad, call.grad.contiguous(memory_format=torch.channels_last), call.grad[:1].expand(6, 4, 3, 2)]
        for grad in grads:
            arguments = (grad, weight, sigma, u, v, None, call.code, 0.5, True)
            torch.library.opcheck(torch.ops.sn_fast.normalize_backward.default, arguments)


def test_gradients_in_float64_go_to_the_reference(kernels: ModuleType) -> None:
    """Where any operand is float64."""
    for chosen in ("grad", "u", "v", "sigma"):
        call = Call.of(CHOSEN["conv"]())
        setattr(call, chosen, getattr(call, chosen).double())
        assert same(call.run(), call.by_reference())
    op = CHOSEN["conv"]()
    call = Call.of(LinearOperator(op.weight.double(), op.geometry))
    assert same(call.run(), call.by_reference())
    call.grad = call.grad.float()
    assert same(call.run(), call.by_reference())


def test_wrong_arguments_are_named(kernels: ModuleType) -> None:
    call = Call.of(CHOSEN["conv"]())

    def run(precision: str = "fp32", **changes: Any) -> None:
        replace(call, **changes).run(precision)

    for changes, says in (
        ({"grad": call.grad[:1]}, r"grad has shape \(1, 12, 3, 3\)"),
        ({"u": call.u[:1]}, r"u has shape \(1, 9, 8\).* \(20, 9, 8\)"),
        ({"u": call.u.flatten()}, r"u has shape"),
        ({"v": call.v[:, 1:]}, r"v has shape"),
        ({"sigma": torch.ones(2)}, r"sigma has shape \(2,\)"),
        ({"precision": "fp16"}, r"'fp16' is unknown; choose one of fp32"),
    ):
        with pytest.raises(ValueError, match=says):
            run(**changes)  # type: ignore[arg-type]
    w, one = torch.randn(3, 3), torch.ones(())
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\)"):
        torch.ops.sn_fast.normalize([w], [torch.ones(3)], [1.0], [True])
    with pytest.raises(ValueError, match="shorter"):
        torch.ops.sn_fast.normalize([w, w], [one], [1.0, 1.0], [True, True])


def test_tensors_of_several_devices_are_named(kernels: ModuleType) -> None:
    """The kernels' own functions: the dispatcher would take a meta tensor for a call to the fakes."""
    call = Call.of(CHOSEN["grouped"]())
    for name in ("grad", "sigma", "u", "v", "group"):
        moved = replace(call, **{name: getattr(call, name).to("meta")})
        arguments = moved.grad, call.op.weight, moved.sigma, moved.u, moved.v, moved.group, call.code, 0.5, True
        with pytest.raises(ValueError, match=f"{name} is on meta, the weight on {DEVICE.type}"):
            ops._normalize_backward_kernel(kernels, *arguments)
    w, one = torch.randn(3, 3), torch.ones(())
    for weights, sigmas, says in (
        ([w, w], [one, one.to("meta")], f"sigma is on meta, its weight on {DEVICE.type}"),
        ([w, w.to("meta")], [one, one.to("meta")], f"weights are on {DEVICE.type}.* and .*meta"),
    ):
        with pytest.raises(ValueError, match=says):
            ops._normalize_kernel(kernels, weights, sigmas, [1.0, 1.0], [True, True])
