"""Calls of power_step and the judge of their accuracy, shared by the tests of its kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from sn_fast import LinearOperator
from sn_fast.ops import plan as plans
from sn_fast.ops import power_step as ops
from sn_fast.ops.plan import Layout, Plan
from sn_fast.reference.power import power_step as reference

KINDS = ("dot", "axpy", "direct", "gemm64", "gemm16")  # csrc/spectral/gather.h: TileKind
UNIT_ROUNDOFF = 2.0**-24  # of float32


@dataclass
class Call:
    """The arguments of one call: operators and their start vectors."""

    operators: Sequence[LinearOperator]
    us: list[Tensor]
    vs: list[Tensor]

    @staticmethod
    def of(*operators: LinearOperator, seed: int = 0) -> Call:
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

    def check(self, n_iterations: int = 1, precision: str = "fp32", factor: float = 2.0) -> ops.Vectors:
        """The result, each operator of which must be about as near to the truth as PyTorch's in float32."""
        found = self.run(n_iterations, precision)
        for i, op in enumerate(self.operators):
            code, groups = op.geometry.encode(), op.geometry.groups

            def advance(*operands: Tensor, code: list[int] = code) -> list[Tensor]:
                return [part[0] for part in reference(*([x] for x in operands), code, n_iterations)[:3]]

            operands = op.weight, self.us[i], self.vs[i]
            u, v, sigma, group = (part[i] for part in found)
            assert u.dtype == v.dtype == sigma.dtype == torch.float32
            u_exact, v_exact, _ = judge([u, v, sigma], advance, operands, [groups, groups, 1], factor)
            check_top_group(op, u_exact, v_exact, int(group))
        return found


def judge(
    found: Sequence[Tensor],
    function: Callable[..., Sequence[Tensor]],
    operands: Sequence[Tensor],
    groups: Sequence[int],
    factor: float = 2.0,
) -> Sequence[Tensor]:
    """Compare with ``function`` in float64 and return its results; errors are relative, the largest over the groups.

    Allowed is ``factor`` times the error of ``function`` in float32. That is luck where there is little to add up (0 at
    best), so twice what rounding the operands alone does to the result comes on top (the largest of a few draws of
    relative errors of up to one unit roundoff: a sum that cancels suffers, whoever computes it), and the roundings that
    all elements share: of the two norms and of sigma.
    """
    exact = function(*(x.double() for x in operands))
    yardstick = _errors(function(*(x.float() for x in operands)), exact, groups)
    generator = torch.Generator().manual_seed(1)
    noise = [0.0] * len(exact)
    for _ in range(3):
        moved = [
            x.double() * (1 + UNIT_ROUNDOFF * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))
            for x in operands
        ]
        noise = list(map(max, noise, _errors(function(*moved), exact, groups)))
    for i, error in enumerate(_errors(found, exact, groups)):
        allowed = factor * yardstick[i] + 2 * noise[i] + 3 * UNIT_ROUNDOFF
        assert error <= allowed, f"result {i}: error {error:.3g}, PyTorch's {yardstick[i]:.3g}, noise {noise[i]:.3g}"
    return exact


def _errors(found: Sequence[Tensor], exact: Sequence[Tensor], groups: Sequence[int]) -> list[float]:
    errors = []
    for a, b, n in zip(found, exact, groups, strict=True):
        assert a.shape == b.shape
        difference = (a.double() - b).reshape(n, -1).norm(dim=1)
        size = b.reshape(n, -1).norm(dim=1).clamp(min=1e-300)
        errors.append(float((difference / size).max()))
    return errors


def check_top_group(op: LinearOperator, u: Tensor, v: Tensor, group: int) -> None:
    """``group`` must attain sigma, up to rounding."""
    weight, g = op.weight.double(), op.geometry
    image = LinearOperator(weight, g).rmatvec(u) if g.axes else LinearOperator(weight, g).matvec(v)
    norms = image.reshape(g.groups, -1).norm(dim=1)
    assert norms[group] >= norms.max() * (1 - 1e-5)


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
        return [plans.GATHER.itemsize, plans.UNIT.itemsize, plans.PIECE.itemsize]


def gathers_of(plan: Plan) -> list[np.ndarray]:
    """The plan's operators, per half step."""
    return np.split(plan._parts[0].numpy().view(plans.GATHER), 2)


def units_of(plan: Plan) -> list[np.ndarray]:
    """The plan's units of work, per half step."""
    return np.split(plan._parts[1].numpy().view(plans.UNIT), [plan.n_units[0]])


def kinds_of(call: Call) -> set[tuple[str, bool]]:
    """Kinds of the tiles that run, and whether their sums are split."""
    units = np.concatenate(units_of(plan_of(call)))
    return {(KINDS[kind], bool(splits > 1)) for kind, splits in zip(units["kind"], units["splits"])}


@contextmanager
def planning(split: bool = False, parallel: int | None = None, **constants: float) -> Iterator[None]:
    """Plans made otherwise: with sums split as often as can be, for a number of blocks, or with other constants."""
    make_units, make_plan = plans._units, ops.Plan
    with pytest.MonkeyPatch.context() as patch:
        for name, value in constants.items():
            patch.setattr(plans, name, value)
        if split:
            patch.setattr(plans, "_LEAST_COST", 1)
            patch.setattr(plans, "_units", lambda t, first, parallel, budget: make_units(t, first, 10**6, 2**30))
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
