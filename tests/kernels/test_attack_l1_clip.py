"""The kernel of the true l1 step within a clip, where bounds are reached: against the reference, and its guarantees."""

from __future__ import annotations

import math
from types import ModuleType

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sn_fast.ops import pgd_step as pgd_ops
from sn_fast.reference import pgd_step as pgd_reference

from ..attacks.models import same_bits
from .conftest import THREAD_ORDERS
from .test_attack_updates import DTYPES, LAYOUTS, ON_CHIP, check, laid_out, norm_of, on_chip

__all__ = ["on_chip"]  # a fixture


def batch(shape: tuple[int, ...] = (4, 3, 6, 7), seed: int = 0, spread: float = 0.1) -> tuple[Tensor, Tensor, Tensor]:
    """x_adv and x in [0, 1], many of their elements on its edges, and a gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, delta, grad = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    x = (0.5 + x).clamp(0, 1)
    return (x + spread * delta).clamp(0, 1), x, grad


def step(x_adv: Tensor, x: Tensor, grad: Tensor, eps: float, alpha: float, **options) -> tuple:
    """Arguments of ``pgd_step``."""
    names = {"eps_per_sample": None, "alpha_per_sample": None, "lower": torch.tensor(0.0), "upper": torch.tensor(1.0)}
    names |= {"targeted": False, "active": None} | options
    return (x_adv, x, grad, "1-exact", eps, alpha, *names.values())


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
def test_layouts_and_dtypes(kernels: ModuleType, on_chip: bool, layout: tuple[str, str, str]) -> None:
    for dtype, grad_dtype in [*zip(DTYPES, DTYPES), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]:
        x_adv, x, grad = (
            laid_out(t.to(d), name) for t, d, name in zip(batch(), (dtype, dtype, grad_dtype), layout, strict=True)
        )
        for eps, alpha in ((math.inf, 3.3), (9.0, 3.3), (2.1, 0.7), (0.4, 40.0)):
            check(pgd_ops.pgd_step, pgd_reference.pgd_step, step(x_adv, x, grad, eps, alpha))


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
def test_bounds_amounts_and_flags(kernels: ModuleType, on_chip: bool) -> None:
    x_adv, x, grad = (t.float() for t in batch())
    per_channel = torch.tensor([0.0, -0.3, 0.1]).reshape(3, 1, 1)
    per_sample = torch.tensor([1.0, 1.2, 5.0, math.inf]).reshape(4, 1, 1, 1)
    eps, alpha = torch.tensor([0.0, 0.7, 5.0, math.inf]), torch.tensor([0.3, 4.0, 0.0, 7.7])
    active = torch.tensor([True, False, True, True])
    for lower, upper in (
        (None, torch.tensor(1.0)),
        (torch.tensor(0.0), None),
        (per_channel, per_sample),
        (x - 0.03, x.contiguous() + 0.07),
        (torch.tensor(-math.inf), torch.tensor(math.inf)),
    ):
        for targeted in (False, True):
            options = {"lower": lower, "upper": upper, "targeted": targeted}
            check(pgd_ops.pgd_step, pgd_reference.pgd_step, step(x_adv, x, grad, 3.0, 1.5, **options))
            amounts = {"eps_per_sample": eps, "alpha_per_sample": alpha}
            check(pgd_ops.pgd_step, pgd_reference.pgd_step, step(x_adv, x, grad, 0.0, 0.0, **amounts, **options))
            found = pgd_ops.pgd_step(*step(x_adv, x, grad, 0.0, 0.0, **amounts, **options, active=active))
            assert same_bits(found[1], x_adv[1])


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 33, 257, 2049, 9001])
def test_sizes(kernels: ModuleType, on_chip: bool, size: int) -> None:
    for dtype in DTYPES:
        x_adv, x, grad = (t.to(dtype) for t in batch((2, size), seed=size))
        for part in (0.001, 0.1, 0.5):
            check(pgd_ops.pgd_step, pgd_reference.pgd_step, step(x_adv, x, grad, part * size, 0.3 * part * size))
            check(pgd_ops.pgd_step, pgd_reference.pgd_step, step(x, x, grad, math.inf, part * size))


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-10, 1e10, 3e38])
def test_scale_of_the_gradient(kernels: ModuleType, on_chip: bool, scale: float) -> None:
    x_adv, x, grad = batch()
    args = (x_adv.float(), x.float(), (grad.clamp(-1, 1) * scale).float())
    check(pgd_ops.pgd_step, pgd_reference.pgd_step, step(*args, 3.0, 1.1))


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
def test_ties_zeros_and_what_is_not_finite(kernels: ModuleType, on_chip: bool) -> None:
    x_adv, x, grad = (t.float() for t in batch(spread=0.0))
    grad[0] = grad[0].sign()
    grad[1] = 0
    grad[2, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    grad[3] = math.nan
    for eps, alpha in ((math.inf, 5.0), (1.0, 5.0), (5.0, 0.1), (3.0, 1e3)):
        moved = pgd_ops.pgd_step(*step(x_adv, x, grad, eps, alpha))
        clean = step(x_adv, x, grad.nan_to_num(0.0, 0.0, 0.0), eps, alpha)
        assert same_bits(moved, check(pgd_ops.pgd_step, pgd_reference.pgd_step, clean))
        assert same_bits(moved[1::2], x_adv[1::2])
        assert not torch.equal(moved[::2], x_adv[::2])
    x_adv[0, 0, 0, 0] = x[0, 0, 0, 0] = math.nan
    moved = pgd_ops.pgd_step(*step(x_adv, x, grad, 2.0, 1.0))
    assert moved.isnan().nonzero().tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
def test_same_bits_in_every_thread_order_and_on_repeat(kernels: ModuleType, on_chip: bool) -> None:
    x_adv, x, grad = (t.float() for t in batch((2, 9001)))
    results = []
    for order in (*THREAD_ORDERS, THREAD_ORDERS[-1]):
        kernels.set_thread_order(order)
        results.append([pgd_ops.pgd_step(*step(x_adv, x, grad, eps, 70.0)) for eps in (20.0, 400.0, math.inf)])
    for again in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(again, results[0], strict=True))


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
def test_a_clip_out_of_reach_is_none(kernels: ModuleType, on_chip: bool) -> None:
    x_adv, x, grad = (t.float() for t in batch())
    far = {"lower": torch.tensor(-1e3), "upper": torch.tensor(1e3)}
    for eps in (0.5, 3.0, math.inf):
        with_clip = pgd_ops.pgd_step(*step(x_adv, x, grad, eps, 1.3, **far))
        without = pgd_ops.pgd_step(*step(x_adv, x, grad, eps, 1.3, lower=None, upper=None))
        torch.testing.assert_close(with_clip, without, rtol=0, atol=1e-7)


properties = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@properties
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    seed=st.integers(0, 2**31),
    eps=st.one_of(st.just(0.0), st.floats(1e-3, 50.0)),
    alpha=st.floats(0.0, 50.0),
    dtype=st.sampled_from(DTYPES),
    resident=st.booleans(),
)
def test_properties(
    kernels: ModuleType,
    shape: tuple[int, ...],
    seed: int,
    eps: float,
    alpha: float,
    dtype: torch.dtype,
    resident: bool,
) -> None:
    x_adv, x, grad = (t.to(dtype) for t in batch(shape, seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pgd_ops, "RESIDENT_BYTES", 96 * 1024 if resident else 0)
        moved = pgd_ops.pgd_step(*step(x_adv, x, grad, eps, alpha))
        first = pgd_ops.pgd_step(*step(x, x, grad, math.inf, alpha))
    rounding = norm_of(torch.finfo(dtype).eps * torch.ones_like(x, dtype=torch.float64), "1")
    assert (norm_of(moved.double() - x.double(), "1") <= eps * (1 + 1e-6) + rounding).all()
    assert moved.min() >= 0
    assert moved.max() <= 1
    room = torch.where(grad > 0, 1 - x.double(), torch.where(grad < 0, x.double(), 0.0)).flatten(1).sum(dim=1)
    spent = norm_of(first.double() - x.double(), "1")
    assert ((spent - room.clamp(max=alpha)).abs() <= alpha * 1e-6 + rounding).all()
