"""Calls of normalize_backward, shared by the tests of its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from sn_fast import LinearOperator
from sn_fast.ops import normalize as ops
from sn_fast.ops.layout import Layout
from sn_fast.ops.library import kernels_of
from sn_fast.ops.plan import GradientPlan
from sn_fast.reference import normalize as reference
from sn_fast.reference.linear_map import weight_gradient

from .accuracy import UNIT_ROUNDOFF, judge, round_operands
from .small_operators import DTYPES, any_operator, conv, line, matrix
from .tensor_cores import relative_size, tensor_core_of

INF, NAN = math.inf, math.nan


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, but any NaN is as good as any other."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    bits = a.contiguous().view(integer) == b.contiguous().view(integer)
    return bool((bits | (a.isnan() & b.isnan())).all())


def above(x: float) -> float:
    """The next float32."""
    return float(torch.nextafter(torch.tensor(x), torch.tensor(INF)))


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
        # WorkItem vectors per group, as they are in use: then both terms of the formula count.
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
        cuts = self._cuts(precision, u, v) if precision in ("tf32", "bf16") else torch.zeros(())
        (exact,) = function(*(x.double() for x in operands))
        if found.dtype == torch.float32:
            size = relative_size(cuts.square(), exact, groups) if cuts.dim() else 0.0
            judge([found], function, operands, [groups], factor, cuts=size)
            return found
        # Half precision rounds once, at the end: each element is one of the two neighbours of the truth, or what
        # float32's error makes of it.
        (single,) = function(*(x.float() for x in operands))
        half_ulp = exact.abs().clamp(min=torch.finfo(found.dtype).smallest_normal) * torch.finfo(found.dtype).eps / 2
        slack = factor * float((single - exact).abs().max()) + 16 * UNIT_ROUNDOFF * float(exact.abs().max())
        slack += float(cuts.max())
        assert bool(((found.double() - exact).abs() <= half_ulp * (1 + 1e-6) + slack).all())
        return found

    def _cuts(self, precision: str, u: Tensor, v: Tensor) -> Tensor:
        """What tensor cores' cuts may do to each element (tensor_cores.py)."""
        module, geometry = kernels_of(u.device), self.op.geometry
        assert module is not None
        layout = Layout.of(self.op.weight, geometry)
        assert layout is not None
        plan = ops._plan(module, layout, u.device, max(ops._LEAST_BUDGET, u.numel() + v.numel()))  # the one that ran
        parts = plan.sizes[-1]
        positions = math.prod(geometry.out_shape(self.op.weight.shape)[1:] if geometry.axes else ())
        if geometry.transposed:
            positions = math.prod(geometry.in_shape(self.op.weight.shape)[1:])
        error = tensor_core_of(module).error(precision, [-(-positions // parts)], 1.0, parts)
        u, v, weight, grad = u.double(), v.double(), self.op.weight.double(), self.grad.double()
        squares = weight_gradient(u.square(), v.square(), weight.shape, geometry)
        size = torch.maximum(squares.sqrt(), weight_gradient(u, v, weight.shape, geometry).abs())
        factor = float((grad * weight).sum().abs() / self.sigma.double().square()) * self.beta
        if self.cap and float(self.sigma) <= self.beta:
            factor = 0.0  # nothing flows through sigma
        cuts = (error * factor * size).reshape(geometry.groups, -1)
        if self.group is not None:
            cuts[[g for g in range(geometry.groups) if g != int(self.group)]] = 0.0
        return cuts.reshape(weight.shape)


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
    "many_taps": lambda: conv(5, 3, (9, 9), (7, 6), padding=4),  # more than the 64 pairs of a tile
    "many_taps_3d": lambda: conv(66, 2, (5, 5, 5), (6, 5, 5), padding=2),
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


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Any operator, and any options."""
    dtype = draw(st.sampled_from(DTYPES))
    op = any_operator(draw, dtype, one_matrix_in=8, largest=70)
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
