"""The kernels of the attacks' updates against the reference: in float64 as oracle, in x's dtype as yardstick."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sn_fast.ops import pgd_step as pgd_ops
from sn_fast.ops import wrm_step as wrm_ops
from sn_fast.reference import pgd_step as pgd_reference
from sn_fast.reference import wrm_step as wrm_reference

from ..attacks.models import same_bits
from .conftest import THREAD_ORDERS

NORMS = ("inf", "2", "1", "1-exact")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPE = (3, 3, 6, 7)  # samples of 126 elements: the middle one starts inside a 16-byte access
ON_CHIP = [pytest.param(True, id="on_chip"), pytest.param(False, id="in_tiles")]


@pytest.fixture
def on_chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether samples may stay in shared memory."""
    if not request.param:
        monkeypatch.setattr(pgd_ops, "RESIDENT_BYTES", 0)
    return request.param


def batch(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x_adv, x and a gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x, delta, grad = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return x + 0.05 * delta, x, grad


def laid_out(t: Tensor, layout: str) -> Tensor:
    """A copy of ``t`` that lies in memory as named."""
    if layout == "channels_last":
        return t.clone(memory_format=torch.channels_last)
    if layout == "transposed":
        return t.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "batch_fastest":
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "unaligned":
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].reshape(t.shape).copy_(t)
    if layout == "sparse":  # samples with holes
        return torch.stack([t, t], dim=-1)[..., 0]
    if layout == "every_other_sample":
        return torch.stack([t, t], dim=1)[:, 0]
    return t.contiguous()


LAYOUTS = [
    ("contiguous", "contiguous", "contiguous"),
    ("channels_last", "channels_last", "channels_last"),
    ("channels_last", "contiguous", "transposed"),
    ("transposed", "transposed", "transposed"),
    ("batch_fastest", "batch_fastest", "contiguous"),
    ("unaligned", "contiguous", "unaligned"),
    ("contiguous", "unaligned", "channels_last"),
    ("sparse", "contiguous", "sparse"),
    ("every_other_sample", "contiguous", "every_other_sample"),
]


def norm_of(t: Tensor, norm: str) -> Tensor:
    """Of each sample, in float64."""
    order = {"inf": math.inf, "2": 2, "1": 1, "1-exact": 1}[norm]
    return torch.linalg.vector_norm(t.double().flatten(1), order, dim=1)


def is_floating(a: Any) -> bool:
    return isinstance(a, Tensor) and a.is_floating_point()


def ulp(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Spacing of ``dtype`` at the magnitudes of ``t``."""
    info = torch.finfo(dtype)
    return info.eps * 2.0 ** t.abs().clamp(min=info.tiny).log2().floor()


def check(op: Callable[..., Tensor], plain: Callable[..., Tensor], args: tuple) -> Tensor:
    """The result of ``op``, which must not be further from the truth than twice ``plain``'s, and 1 ulp."""
    found = op(*args)
    x_adv = args[0]
    assert found.dtype == x_adv.dtype
    assert found.stride() == torch.empty_like(x_adv).stride()
    exact = plain(*(a.double() if is_floating(a) else a for a in args))
    yardstick = (plain(*args).double() - exact).abs().max()
    error = (found.double() - exact).abs()
    allowed = 2 * yardstick + ulp(exact, found.dtype)
    assert (error <= allowed).all(), f"error {error.max():.3g}, the reference's {yardstick:.3g}"
    return found


# -- every norm, dtype, layout, option --------------------------------------------------------------------------------


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("norm", NORMS)
def test_layouts_and_dtypes(kernels: ModuleType, on_chip: bool, layout: tuple[str, str, str], norm: str) -> None:
    for dtype, grad_dtype in [*zip(DTYPES, DTYPES), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]:
        x_adv, x, grad = (
            laid_out(t.to(d), name) for t, d, name in zip(batch(), (dtype, dtype, grad_dtype), layout, strict=True)
        )
        bounds = torch.tensor([-1.0, -0.5, -0.8]).reshape(3, 1, 1), torch.tensor(1.5)
        for eps in (0.3, math.inf):
            check(
                pgd_ops.pgd_step,
                pgd_reference.pgd_step,
                (x_adv, x, grad, norm, eps, 0.4, *[None] * 2, *bounds, False, None),
            )
        check(pgd_ops.project, pgd_reference.project, (x_adv, x, norm, 0.2, None, *bounds))
        if norm == "inf":
            check(wrm_ops.wrm_step, wrm_reference.wrm_step, (x_adv, x, grad, 0.1, None, 0.7, *bounds))


def clips(x: Tensor) -> list[tuple[Tensor | None, Tensor | None]]:
    n, c, _, w = x.shape
    low = torch.linspace(-1.0, -0.2, n * c * w)
    return [
        (None, None),
        (torch.tensor(-0.5), torch.tensor(0.5)),
        (None, low[:c].reshape(c, 1, 1) + 1),
        (low[:n].reshape(n, 1, 1, 1), None),
        (low[: n * c].reshape(n, c, 1, 1), torch.tensor(0.5, dtype=torch.float64)),
        (low[: c * w].reshape(c, 1, w), low[:w] + 1),  # no single run
        (low[: 2 * c : 2].as_strided((c, 1, 1), (2, 1, 1)), None),
        (x.float() - 0.1, x.float().contiguous() + 0.1),
        (x[:1].float() - 0.5, x[:1] + 0.5),
    ]


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", NORMS)
def test_options(kernels: ModuleType, on_chip: bool, layout: str, norm: str) -> None:
    x_adv, x, grad = (laid_out(t.float(), layout) for t in batch())
    eps, alpha = torch.tensor([0.05, math.inf, 0.0]), torch.tensor([0.3, 0.4, 0.1])
    active = torch.tensor([True, False, True])
    for i, (lower, upper) in enumerate(clips(x)):
        for eps_per_sample, mask, targeted in ((None, None, True), (eps, None, False), (eps, active, True)):
            alpha_per_sample = alpha if (i + targeted) % 2 else None
            args = (x_adv, x, grad, norm, 0.1, 0.2, eps_per_sample, alpha_per_sample, lower, upper, targeted, mask)
            found = check(pgd_ops.pgd_step, pgd_reference.pgd_step, args)
            if mask is not None:
                assert same_bits(found[1], x_adv[1])
            if lower is None and upper is None and eps_per_sample is not None and mask is None:
                assert same_bits(found[2], x[2])  # eps = 0
        check(pgd_ops.project, pgd_reference.project, (x_adv + 0.1 * grad, x, norm, 0.1, eps, lower, upper))
        check(
            wrm_ops.wrm_step, wrm_reference.wrm_step, (x_adv, x, grad, -0.3, None, 1 / math.sqrt(2 + i), lower, upper)
        )
        check(wrm_ops.wrm_step, wrm_reference.wrm_step, (x_adv, x, grad, 0.0, alpha, 1.0, lower, upper))


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 31, 33, 129, 257, 2049])
def test_sizes(kernels: ModuleType, on_chip: bool, size: int) -> None:
    for dtype, norm in itertools.product(DTYPES, NORMS):
        x_adv, x, grad = (t.to(dtype) for t in batch((3, size), seed=size))
        per_channel = torch.linspace(0, 1, size)
        for eps in (0.1, 1.0):
            check(
                pgd_ops.pgd_step,
                pgd_reference.pgd_step,
                (x_adv, x, grad, norm, eps, 0.5, *[None] * 3, per_channel, True, None),
            )
        check(pgd_ops.project, pgd_reference.project, (x_adv, x, norm, 0.05, None, None, per_channel))


@pytest.mark.parametrize("norm", NORMS[1:])
@pytest.mark.parametrize("size", [8120, 8160, 8192, 8200, 16385, 40003])
def test_large_samples(kernels: ModuleType, norm: str, size: int) -> None:
    """About the size that no longer fits on chip, and of several tiles."""
    dtype = torch.float16 if size % 3 == 0 else torch.float32
    x_adv, x, grad = (t.to(dtype) for t in batch((2, size)))
    for eps in (3.0, 1e4):
        check(pgd_ops.pgd_step, pgd_reference.pgd_step, (x_adv, x, grad, norm, eps, 7.0, *[None] * 4, False, None))
        check(pgd_ops.project, pgd_reference.project, (x_adv, x, norm, eps / 2, *[None] * 3))


def test_gradient_that_undoes_the_perturbation(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where |d + s g|^2 from three sums cancels, the sample is inside, or the step is long against the ball."""
    monkeypatch.setattr(pgd_ops, "RESIDENT_BYTES", 0)
    x_adv, x, _ = (t.float() for t in batch())
    distance = norm_of(x_adv - x, "2").float()
    for alpha in (distance, 1.01 * distance, 2.5 * distance):
        check(
            pgd_ops.pgd_step,
            pgd_reference.pgd_step,
            (x_adv, x, x - x_adv, "2", 0.1, 0.0, None, alpha, None, None, False, None),
        )


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize(
    "sample",
    [
        [2.0**-k for k in range(100)],  # Newton alone drops one element per pass
        [1.0] * 50,
        [1.0] * 3 + [1e-3] * 60 + [0.0] * 7,
        [1e-30, 1e30, 1.0],
        [3.0],
    ],
)
def test_l1_threshold(kernels: ModuleType, on_chip: bool, sample: list[float]) -> None:
    delta = torch.tensor([sample, sample[::-1]]) * torch.tensor([1.0, -1.0]).reshape(2, 1)
    x = torch.zeros_like(delta)
    norm = float(delta[0].double().abs().sum())
    for part in (0.0, 1e-6, 0.01, 0.3, 0.9, 0.999999, 1.0, 1.1):
        eps = float(torch.tensor(part * norm))  # as the kernel rounds it
        found = check(pgd_ops.project, pgd_reference.project, (delta, x, "1-exact", eps, None, None, None))
        assert (found.double().abs().sum(dim=1) <= eps * (1 + 1e-6)).all()
        if part >= 1.1:
            assert same_bits(found, delta)


# -- gradients that are hard on a norm --------------------------------------------------------------------------------


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-22, 1e-10, 1e10, 1e30, 3e38])
def test_scale_of_the_gradient(kernels: ModuleType, on_chip: bool, norm: str, scale: float) -> None:
    x_adv, x, grad = batch()
    grad = grad.clamp(-1, 1) * scale
    args = (x_adv.float(), x.float(), grad.float(), norm, 0.2, 0.3, *[None] * 4, False, None)
    check(pgd_ops.pgd_step, pgd_reference.pgd_step, args)
    moved = (
        pgd_ops.pgd_step(x.float(), x.float(), grad.float(), norm, math.inf, 0.5, *[None] * 4, False, None) - x.float()
    )
    assert norm_of(moved, norm).sub(0.5).abs().max() < 1e-5


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_and_non_finite_gradients(kernels: ModuleType, on_chip: bool, norm: str, dtype: torch.dtype) -> None:
    x_adv, x, grad = (t.to(dtype) for t in batch())
    x_adv[1, 0, 0, 0] = -0.0
    grad[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    grad[1] = 0
    grad[2] = math.nan
    clean = grad.nan_to_num(0.0, 0.0, 0.0)
    rest = (norm, 9.0, 0.1, *[None] * 4, False, None)
    moved = pgd_ops.pgd_step(x_adv, x, grad, *rest)
    assert same_bits(moved, pgd_ops.pgd_step(x_adv, x, clean, *rest))
    check(pgd_ops.pgd_step, pgd_reference.pgd_step, (x_adv, x, clean, *rest))
    assert torch.equal(moved[1:], x_adv[1:])
    assert not torch.equal(moved[0], x_adv[0])
    if norm == "inf":
        wrm = (0.3, None, 0.5, None, None)
        assert same_bits(wrm_ops.wrm_step(x_adv, x, grad, *wrm), wrm_ops.wrm_step(x_adv, x, clean, *wrm))
    else:
        assert same_bits(moved[1:], x_adv[1:])


def test_wrm_steps_of_0_and_1_are_exact(kernels: ModuleType) -> None:
    x_adv, x, grad = (t.float() for t in batch())
    assert same_bits(wrm_ops.wrm_step(x_adv, x, grad, 0.25, None, 1.0, None, None), x + 0.25 * grad)
    assert same_bits(wrm_ops.wrm_step(x_adv, x, grad, 0.25, None, 0.0, None, None), x_adv)


@pytest.mark.parametrize("norm", NORMS)
def test_nan_in_x_stays_in_its_element(kernels: ModuleType, norm: str) -> None:
    x_adv, x, grad = (t.float() for t in batch())
    x_adv[0, 0, 0, 0] = x[0, 0, 0, 0] = math.nan
    bound = torch.tensor(5.0)
    moved = pgd_ops.pgd_step(x_adv, x, grad, norm, 0.3, 0.1, None, None, -bound, bound, False, None)
    assert moved.isnan().sum() == 1
    assert moved[0, 0, 0, 0].isnan()


# -- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("norm", NORMS)
def test_same_bits_in_every_thread_order_and_on_repeat(kernels: ModuleType, on_chip: bool, norm: str) -> None:
    x_adv, x, grad = (t.float() for t in batch((2, 9001)))
    active = torch.tensor([True, True])
    results = []
    for order in (*THREAD_ORDERS, THREAD_ORDERS[-1]):
        kernels.set_thread_order(order)
        moved = pgd_ops.pgd_step(x_adv, x, grad, norm, 2.0, 3.0, *[None] * 4, False, active)
        results.append((moved, pgd_ops.project(x_adv, x, norm, 0.5, None, None, None)))
        results[-1] += (wrm_ops.wrm_step(x_adv, x, grad, 0.1, None, 0.3, None, None),)
    for again in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(again, results[0], strict=True))


@pytest.mark.parametrize("on_chip", ON_CHIP, indirect=True)
@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_does_not_depend_on_its_batch(kernels: ModuleType, on_chip: bool, norm: str) -> None:
    x_adv, x, grad = (t.float() for t in batch((4, 333)))
    rest = (norm, 0.3, 0.5, *[None] * 4, False, None)
    together = pgd_ops.pgd_step(x_adv, x, grad, *rest)
    for i in range(4):
        alone = pgd_ops.pgd_step(*(t[i : i + 1].clone() for t in (x_adv, x, grad)), *rest)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=3e-7)


properties = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@properties
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    seed=st.integers(0, 2**31),
    eps=st.one_of(st.just(0.0), st.floats(1e-3, 5.0)),
    alpha=st.floats(0.0, 5.0),
    dtype=st.sampled_from(DTYPES),
    norm=st.sampled_from(NORMS),
    resident=st.booleans(),
)
def test_properties(
    kernels: ModuleType,
    shape: tuple[int, ...],
    seed: int,
    eps: float,
    alpha: float,
    dtype: torch.dtype,
    norm: str,
    resident: bool,
) -> None:
    x_adv, x, grad = (t.to(dtype) for t in batch(shape, seed))
    active = torch.arange(shape[0]) % 2 == 0
    rest = (None, None, None, None, False, active)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pgd_ops, "RESIDENT_BYTES", 96 * 1024 if resident else 0)
        moved = pgd_ops.pgd_step(x_adv, x, grad, norm, eps, alpha, *rest)
        inside = pgd_ops.project(x_adv, x, norm, 1e-6 + 1.01 * norm_of(x_adv - x, norm).max().item(), *[None] * 3)
    assert same_bits(moved[~active], x_adv[~active])
    assert same_bits(inside, x_adv)
    delta = (moved.double() - x.double())[active]
    rounding = norm_of(torch.finfo(dtype).eps * (x.double().abs() + 5)[active], norm)
    assert (norm_of(delta, norm) <= eps + rounding).all()
