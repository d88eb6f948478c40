"""Calls of power_step and the operators they are made for, shared by the tests of its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from sn_fast.layers import LayerOperator
from sn_fast.ops import plan as plans
from sn_fast.ops import power_step as ops
from sn_fast.ops import schedule
from sn_fast.ops.layout import Layout
from sn_fast.ops.library import kernels_of
from sn_fast.ops.plan import Plan
from sn_fast.reference.linear_map import matvec, rmatvec
from sn_fast.reference.power import power_step as reference

from .accuracy import judge, round_operands
from .small_operators import DTYPES, any_operator, conv, line, matrix
from .tensor_cores import longest_chain, relative_size, tensor_core_of

KINDS = ("dot", "axpy", "direct", "gemm64", "gemm16")  # csrc/spectral/plan.h: TileKind

CHOSEN: dict[str, Callable[[], LayerOperator]] = {
    "gemm64": lambda: line(70, 20, 70),
    "gemm64_whole": lambda: line(70, 1, 200),
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


@st.composite
def operators(draw: st.DrawFn, most_products: int = 1_000_000) -> LayerOperator:
    """Any operator that is quick to run."""
    op = any_operator(draw, draw(st.sampled_from(DTYPES)), one_matrix_in=6, largest=300)
    assume(useful_products(Call([op], [], [])) <= most_products)
    return op


@dataclass
class Call:
    """The arguments of one call: operators and their start vectors."""

    operators: Sequence[LayerOperator]
    us: list[Tensor]
    vs: list[Tensor]

    @staticmethod
    def of(*operators: LayerOperator, seed: int = 0) -> Call:
        generator = torch.Generator().manual_seed(seed)
        us, vs = (
            [torch.randn(shape, generator=generator) for shape in shapes]
            for shapes in ([op.out_shape for op in operators], [op.in_shape for op in operators])
        )
        return Call(operators, us, vs)

    @property
    def weights(self) -> list[Tensor]:
        return [op.weight for op in self.operators]

    @property
    def code(self) -> list[int]:
        return [c for op in self.operators for c in op.geometry.encode()]

    def run(self, n_iterations: int = 1, precision: str = "fp32") -> ops.Vectors:
        return ops.power_step(self.weights, self.us, self.vs, self.code, n_iterations, precision)

    def by_reference(self, n_iterations: int = 1) -> ops.Vectors:
        return reference(self.weights, self.us, self.vs, self.code, n_iterations)

    def check(
        self, n_iterations: int = 1, precision: str = "fp32", factor: float = 2.0, cuts: float = 0.0
    ) -> ops.Vectors:
        """The result, each operator of which must be about as near to the truth as PyTorch's in float32."""
        found = self.run(n_iterations, precision)
        for i, op in enumerate(self.operators):
            code, groups = op.geometry.encode(), op.geometry.groups

            def advance(*operands: Tensor, code: list[int] = code) -> list[Tensor]:
                return [part[0] for part in reference(*([x] for x in operands), code, n_iterations)[:3]]

            operands = op.weight, self.us[i], self.vs[i]
            u, v, sigma, group = (part[i] for part in found)
            assert u.dtype == v.dtype == sigma.dtype == torch.float32
            u_exact, v_exact, _ = judge([u, v, sigma], advance, operands, [groups, groups, 1], factor, cuts)
            check_top_group(op, u_exact, v_exact, int(group))
        return found


def check_top_group(op: LayerOperator, u: Tensor, v: Tensor, group: int) -> None:
    """``group`` must attain sigma, up to rounding."""
    weight, g = op.weight.double(), op.geometry
    image = LayerOperator(weight, g).rmatvec(u) if g.axes else LayerOperator(weight, g).matvec(v)
    norms = image.reshape(g.groups, -1).norm(dim=1)
    assert norms[group] >= norms.max() * (1 - 1e-5)


def check_precision(op: LayerOperator, precision: str) -> None:
    """Each half step of its own, from the very input it had, with operands rounded as GEMM tiles round them."""
    call = Call.of(op)
    if precision in ("fp32", "3xtf32"):
        call.check(precision=precision, factor=2.0 if precision == "fp32" else 4.0)
        return
    (u,), (v,), (sigma,), _ = call.run(precision=precision)
    module = kernels_of(op.weight.device)
    assert module is not None
    (plan,) = ops.plans_of(module, "power_step", call.weights, call.code) or ()  # the one that ran
    g = op.geometry
    halves: list[tuple[Callable[..., Tensor], Tensor, Tensor]] = [(matvec, call.vs[0], u), (rmatvec, u, v)]
    if not g.axes:
        halves = [(rmatvec, call.us[0], v), (matvec, v, u)]
    for half, (apply, start, found) in enumerate(halves):

        def normalized(weight: Tensor, x: Tensor, apply: Callable[..., Tensor] = apply) -> list[Tensor]:
            groups = apply(x[None], weight, g)[0].reshape(g.groups, -1)
            norms = groups.norm(dim=1, keepdim=True)
            return [groups / norms.clamp(min=1e-30), norms.max()]

        gemm = any(KINDS[kind].startswith("gemm") for kind in set(items_of(plan)[half]["kind"]))
        operands = round_operands(precision if gemm else "fp32", op.weight.float(), start)
        weight, x = (t.double() for t in operands)
        if not bool((normalized(weight, x)[0].norm(dim=1) > 0).all()):
            continue
        cuts = 0.0
        if gemm:
            squares, total = apply(x.square()[None], weight.square(), g)[0], apply(x[None], weight, g)[0]
            depths, parts = longest_chain(plan, half)
            size = relative_size(squares, total, g.groups)
            cuts = tensor_core_of(module).error(precision, depths, size, parts)
        results = [found.reshape(g.groups, -1), sigma if half else normalized(weight, x)[1]]
        judge(results, normalized, operands, [g.groups, 1], cuts=cuts)


def plan_of(call: Call, parallel: int = 9) -> Plan:
    """The plan of a call, as made for ``parallel`` blocks."""
    layouts = [Layout.of(op.weight, op.geometry) for op in call.operators]
    assert None not in layouts
    return plan_from([layout for layout in layouts if layout is not None], parallel)


def plan_from(layouts: Sequence[Layout], parallel: int) -> Plan:
    return Plan(_Sizes, layouts, torch.device("cpu"), parallel)  # type: ignore[arg-type]


class _Sizes:
    """All that a plan asks of the compiled module."""

    @staticmethod
    def plan_struct_sizes() -> list[int]:
        return [plans.OPERATOR_MAP.itemsize, schedule.WORK_ITEM.itemsize, plans.VECTOR_SLICE.itemsize]


def maps_of(plan: Plan) -> list[np.ndarray]:
    """The plan's operators, per half step."""
    return np.split(plan.tables[0].view(plans.OPERATOR_MAP), 2)


def items_of(plan: Plan) -> list[np.ndarray]:
    """The plan's units of work, per half step."""
    return np.split(plan.tables[1].view(schedule.WORK_ITEM), [plan.n_items[0]])


def kinds_of(call: Call) -> set[tuple[str, bool]]:
    """Kinds of the tiles that run, and whether their sums are split."""
    items = np.concatenate(items_of(plan_of(call)))
    return {(KINDS[kind], bool(splits > 1)) for kind, splits in zip(items["kind"], items["splits"])}


@contextmanager
def planning(split: bool = False, parallel: int | None = None, **constants: float) -> Iterator[None]:
    """Plans made otherwise: with sums split as often as can be, for a number of blocks, or with other constants."""
    make_schedule, make_plan = plans.make_schedule, ops.Plan
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(schedule, name, value)
        if split:
            for name in ("_ITEM_COST", "_PART_COST", "_JOIN_COST"):
                patch.setattr(schedule, name, 0)
            patch.setattr(schedule, "_SHARES", (math.inf, 1e-12))
            patch.setattr(schedule, "_ENOUGH", 0)
            patch.setattr(plans, "make_schedule", lambda t, first, _, __, c: make_schedule(t, first, 10**6, 2**30, c))
        if parallel is not None:
            patch.setattr(ops, "Plan", lambda module, layouts, device, _: make_plan(module, layouts, device, parallel))
        ops._plans.cache_clear()
        try:
            yield
        finally:
            ops._plans.cache_clear()


def useful_products(call: Call) -> int:
    """Multiply-adds of one half step that have to be done: those of every tap that reads something."""
    total = 0
    for op in call.operators:
        g = op.geometry
        reads = (sum(p is not None for o in range(a.out) for p in a.window(o, g.mode)) for a in g.axes)
        rows, columns = op.weight.shape[:2]
        total += rows * columns * math.prod(reads)
    return total
