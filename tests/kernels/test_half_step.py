"""One product of every operator in one launch, against the operators themselves; and the iteration of sharded rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sn_fast.layers import LayerOperator
from sn_fast.ops.half_step import half_step

from .power_steps import CHOSEN
from .small_operators import conv, matrix

pytestmark = pytest.mark.usefixtures("kernels")


def code_of(operators: list[LayerOperator]) -> list[int]:
    return [c for o in operators for c in o.geometry.encode()]


def multiplied(o: LayerOperator, x: Tensor, forward: bool) -> Tensor:
    exact = LayerOperator(o.weight.double(), o.geometry)
    return (exact.matvec if forward else exact.rmatvec)(x.double())


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "3xtf32", "tf32"])
def test_products_of_every_kind(second: bool, precision: str) -> None:
    operators = [make() for make in CHOSEN.values()]
    forward = [bool(o.geometry.axes) != second for o in operators]
    vectors = [torch.randn(o.in_shape if f else o.out_shape) for o, f in zip(operators, forward)]
    found = half_step([o.weight for o in operators], vectors, code_of(operators), second, precision)
    tolerance = 2e-3 if precision == "tf32" else 3e-6
    for o, x, f, y in zip(operators, vectors, forward, found, strict=True):
        wanted = multiplied(o, x, f)
        assert y.shape == wanted.shape
        assert float((y - wanted).norm()) <= tolerance * float(wanted.norm()) + 1e-6 * float(o.weight.norm() * x.norm())


def test_rows_of_a_weight_on_several_devices() -> None:
    """Local u, and the sum of all shards' A^T u: one iteration of the whole weight."""
    for whole in (conv(12, 5, (3, 3), (7, 7), stride=2, padding=1), matrix(12, 40)):
        is_conv = bool(whole.geometry.axes)
        v, u = torch.randn(whole.in_shape), torch.randn(whole.out_shape)
        back = torch.zeros(whole.in_shape)
        for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
            shard = LayerOperator(whole.weight[rows].contiguous(), whole.geometry)
            (local,) = half_step([shard.weight], [v], code_of([shard]), second=not is_conv)
            torch.testing.assert_close(local, whole.matvec(v)[rows], rtol=1e-5, atol=1e-5)
            (part,) = half_step([shard.weight], [u[rows]], code_of([shard]), second=is_conv)
            back += part
        torch.testing.assert_close(back, whole.rmatvec(u), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    o = matrix(4, 6)
    with pytest.raises(ValueError, match=r"x has shape \(5,\), the operator needs \(6,\)"):
        half_step([o.weight], [torch.randn(5)], code_of([o]), True)
    with pytest.raises(ValueError, match="2 vectors x for 1 weights"):
        half_step([o.weight], [torch.randn(6)] * 2, code_of([o]), True)


def test_float64_goes_to_the_reference() -> None:
    o = conv(4, 3, (3, 3), (6, 6), padding=1)
    x = torch.randn(o.in_shape, dtype=torch.float64)
    (found,) = half_step([o.weight.double()], [x], code_of([o]), False)
    torch.testing.assert_close(found, multiplied(o, x, True), rtol=1e-12, atol=1e-12)


def test_opcheck() -> None:
    operators = [conv(4, 3, (3, 3), (6, 6), padding=1), matrix(5, 7)]
    vectors = [torch.randn(operators[0].in_shape), torch.randn(operators[1].out_shape)]
    args = ([o.weight for o in operators], vectors, code_of(operators), False)
    torch.library.opcheck(torch.ops.sn_fast.half_step.default, args)
