"""The updates: directions, projections, precision, independence of samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sn_fast.attacks import pgd_step, project, wrm_step
from sn_fast.ops import pgd_step as pgd_ops
from sn_fast.ops import wrm_step as wrm_ops
from sn_fast.reference import pgd_step as pgd_reference

from .models import CANONICAL, NORMS, per_sample_norm, same_bits, triple


def expected_direction(grad: Tensor, norm: str) -> Tensor:
    """In float64, straight from the definition."""
    g = grad.double().flatten(1)
    if norm == "Linf":
        d = g.sign()
    elif norm == "L1-exact":
        top = g.abs() == g.abs().amax(dim=1, keepdim=True)
        d = g.sign() * top / top.sum(dim=1, keepdim=True)
    else:
        g = g / g.abs().amax(dim=1, keepdim=True)
        d = g / g.norm(p={"L2": 2, "L1": 1}[norm], dim=1, keepdim=True)
    return d.reshape(grad.shape)


# -- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_step_follows_the_definition(norm: str, targeted: bool) -> None:
    x_adv, x, grad = triple(torch.float64)
    moved = pgd_step(x_adv, x, grad, norm=norm, eps=math.inf, alpha=0.7, targeted=targeted)
    sign = -1 if targeted else 1
    torch.testing.assert_close(moved, x_adv + sign * 0.7 * expected_direction(grad, norm), rtol=0, atol=1e-14)
    inside = pgd_step(x_adv, x, grad, norm=norm, eps=0.2, alpha=0.7, targeted=targeted)
    assert same_bits(inside, project(moved, x, norm=norm, eps=0.2))
    if norm != "L1-exact":  # whose direction depends on the clip: test_l1_clip.py
        clipped = pgd_step(x_adv, x, grad, norm=norm, eps=0.2, alpha=0.7, clip=(0.1, 0.9), targeted=targeted)
        assert same_bits(clipped, project(moved, x, norm=norm, eps=0.2, clip=(0.1, 0.9)))


def test_true_l1_step_shares_between_ties() -> None:
    x = torch.zeros(1, 4)
    moved = pgd_step(x, x, torch.tensor([[3.0, -3.0, 2.999999, 0.0]]), norm="L1-exact", eps=1.0, alpha=1.0)
    assert moved.tolist() == [[0.5, -0.5, 0.0, 0.0]]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zero_gradient_changes_no_bit(norm: str, dtype: torch.dtype) -> None:
    x_adv, x, grad = triple(dtype)
    grad[1:] = 0
    moved = pgd_step(x_adv, x, grad, norm=norm, eps=1.0, alpha=0.25)
    assert same_bits(moved[1:], x_adv[1:])
    assert not torch.equal(moved[0], x_adv[0])


@pytest.mark.parametrize("norm", NORMS)
def test_powers_of_two_in_the_gradient_change_no_bit(norm: str) -> None:
    x_adv, x, grad = triple()
    moved = pgd_step(x_adv, x, grad, norm=norm, eps=0.3, alpha=0.1)
    for exponent in (-100, -64, -7, 50, 120):
        assert same_bits(pgd_step(x_adv, x, grad * 2.0**exponent, norm=norm, eps=0.3, alpha=0.1), moved)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-22),  # squares underflow
        (torch.float32, 1e-44),  # denormal: a handful of levels
        (torch.float32, 1e30),  # squares overflow
        (torch.float64, 1e-200),
        (torch.float64, 1e200),
        (torch.float16, 6e-8),  # the smallest
        (torch.float16, 6e4),
    ],
)
def test_length_of_the_step_at_any_scale_of_the_gradient(norm: str, dtype: torch.dtype, scale: float) -> None:
    x = torch.zeros(3, 40, dtype=dtype)
    grad = (torch.randn(3, 40, dtype=torch.float64).clamp(-1, 1) * scale).to(dtype)
    assert grad.any(dim=1).all()
    moved = pgd_step(x, x, grad, norm=norm, eps=math.inf, alpha=0.5)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(moved.double(), 0.5 * expected_direction(grad, norm), rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_non_finite_gradient_elements_count_as_zero(norm: str) -> None:
    x_adv, x, grad = triple()
    broken = grad.clone()
    broken[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    broken[1] = math.nan
    clean = broken.nan_to_num(0.0, 0.0, 0.0)
    kwargs = {"norm": norm, "eps": 0.3, "alpha": 0.1}
    assert same_bits(pgd_step(x_adv, x, broken, **kwargs), pgd_step(x_adv, x, clean, **kwargs))
    assert same_bits(wrm_step(x_adv, x, broken, eps=0.3, step=0.5), wrm_step(x_adv, x, clean, eps=0.3, step=0.5))


@pytest.mark.parametrize("step", [1.0, 0.4])
def test_wrm_step_follows_the_definition(step: float) -> None:
    x_adv, x, grad = triple(torch.float64)
    wanted = x_adv + step * (0.3 * grad - (x_adv - x))
    torch.testing.assert_close(wrm_step(x_adv, x, grad, eps=0.3, step=step), wanted, rtol=0, atol=1e-15)
    clipped = wrm_step(x_adv, x, grad, eps=0.3, step=step, clip=(0.2, 0.8))
    torch.testing.assert_close(clipped, wanted.clamp(0.2, 0.8), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_float32_rounded_once(norm: str, dtype: torch.dtype) -> None:
    halves = triple(dtype)
    singles = [t.float() for t in halves]
    kwargs = {"norm": norm, "eps": 0.02, "alpha": 0.01, "clip": (0.05, 0.95)}
    assert same_bits(pgd_step(*halves, **kwargs), pgd_step(*singles, **kwargs).to(dtype))
    assert same_bits(wrm_step(*halves, eps=0.1, step=0.3), wrm_step(*singles, eps=0.1, step=0.3).to(dtype))
    kwargs.pop("alpha")
    assert same_bits(project(*halves[:2], **kwargs), project(*singles[:2], **kwargs).to(dtype))


def test_gradient_may_be_of_another_precision() -> None:
    x_adv, x, grad = triple(torch.float16)
    exact = pgd_step(x_adv, x, grad.float() * 1e-6, norm=2, eps=0.3, alpha=0.1)  # float16 would flush the gradient
    assert exact.dtype == torch.float16
    assert same_bits(exact, pgd_step(x_adv, x, grad.float(), norm=2, eps=0.3, alpha=0.1))


# -- samples are independent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_per_sample_amounts_equal_a_loop(norm: str) -> None:
    x_adv, x, grad = triple(torch.float64)
    eps, alpha = torch.tensor([0.0, 0.1, 2.0, math.inf]), torch.tensor([0.3, 0.05, 0.0, 1.5])
    together = pgd_step(x_adv, x, grad, norm=norm, eps=eps, alpha=alpha)
    projected = project(x_adv + grad, x, norm=norm, eps=eps)
    pulled = wrm_step(x_adv, x, grad, eps=eps[:3].repeat(2)[:4], step=0.5)
    for i in range(4):
        one = slice(i, i + 1)
        e, a = float(eps[i].double()), float(alpha[i].double())
        torch.testing.assert_close(
            together[one], pgd_step(x_adv[one], x[one], grad[one], norm=norm, eps=e, alpha=a), rtol=0, atol=1e-14
        )
        torch.testing.assert_close(
            projected[one], project((x_adv + grad)[one], x[one], norm=norm, eps=e), rtol=0, atol=1e-14
        )
        e = float(eps[i % 3])
        torch.testing.assert_close(
            pulled[one], wrm_step(x_adv[one], x[one], grad[one], eps=e, step=0.5), rtol=0, atol=1e-14
        )
    assert same_bits(together[0], x[0])  # eps = 0


@pytest.mark.parametrize("norm", NORMS)
def test_batch_equals_concatenation(norm: str) -> None:
    batch = triple()
    together = pgd_step(*batch, norm=norm, eps=0.2, alpha=0.3)
    alone = [pgd_step(*(t[i : i + 1] for t in batch), norm=norm, eps=0.2, alpha=0.3) for i in range(len(together))]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=2e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_order_of_features_does_not_matter(norm: str) -> None:
    batch = triple(torch.float64, (3, 50))
    order = torch.randperm(50)
    moved = pgd_step(*batch, norm=norm, eps=0.2, alpha=0.3)
    permuted = pgd_step(*(t[:, order] for t in batch), norm=norm, eps=0.2, alpha=0.3)
    torch.testing.assert_close(permuted, moved[:, order], rtol=0, atol=1e-14)


@pytest.mark.parametrize("norm", NORMS)
def test_inactive_samples_keep_every_bit(norm: str) -> None:
    x_adv, x, grad = triple()
    x_adv = x_adv + 5  # outside ball and clip
    active = torch.tensor([True, False, True, False])
    kwargs = {"norm": norm, "eps": 0.3, "alpha": 0.1, "clip": (0.0, 1.0)}
    moved = pgd_step(x_adv, x, grad, active=active, **kwargs)
    assert same_bits(moved[~active], x_adv[~active])
    assert same_bits(moved[active], pgd_step(x_adv, x, grad, **kwargs)[active])


# -- projections ------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
radii = st.one_of(st.just(0.0), st.floats(1e-3, 20.0))
seeds = st.integers(0, 2**31)


def pair(seed: int, shape: tuple[int, ...], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Two points and a centre, in float64."""
    generator = torch.Generator().manual_seed(seed)
    z, w, x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return scale * z, scale * w, x


@given(shape=shapes, eps=radii, seed=seeds, scale=st.sampled_from([0.01, 1.0, 100.0]), norm=st.sampled_from(NORMS))
def test_projection_is_feasible_and_idempotent(
    shape: tuple[int, ...], eps: float, seed: int, scale: float, norm: str
) -> None:
    z, _, x = pair(seed, shape, scale)
    p = project(z, x, norm=norm, eps=eps)
    rounding = 1e-14 * z[0].numel() * (1 + scale)
    assert (per_sample_norm(p - x, norm) <= eps + rounding).all()
    torch.testing.assert_close(project(p, x, norm=norm, eps=eps), p, rtol=0, atol=rounding)


@given(
    shape=shapes,
    eps=radii,
    seed=seeds,
    scale=st.sampled_from([0.01, 1.0, 100.0]),
    norm=st.sampled_from(["Linf", "L2", "L1-exact"]),
)
def test_projection_does_not_expand(shape: tuple[int, ...], eps: float, seed: int, scale: float, norm: str) -> None:
    z, w, x = pair(seed, shape, scale)
    apart = per_sample_norm(z - w, "L2")
    projected = per_sample_norm(project(z, x, norm=norm, eps=eps) - project(w, x, norm=norm, eps=eps), "L2")
    assert (projected <= apart + 1e-12 * (1 + scale)).all()


@given(shape=shapes, seed=seeds, norm=st.sampled_from(NORMS), dtype=st.sampled_from([torch.float16, torch.float32]))
def test_projection_keeps_the_bits_of_samples_inside(
    shape: tuple[int, ...], seed: int, norm: str, dtype: torch.dtype
) -> None:
    z, _, x = (t.to(dtype) for t in pair(seed, shape, 1.0))
    distance = per_sample_norm(z - x, norm)
    outside = project(z, x, norm=norm, eps=0.5 * distance)
    assert same_bits(project(z, x, norm=norm, eps=1.01 * distance), z)
    assert same_bits(project(z, x, norm=norm, eps=math.inf), z)
    assert not torch.equal(outside, z)


@given(shape=shapes, eps=st.floats(0.01, 5.0), seed=seeds)
def test_true_l1_projection_meets_its_optimality_conditions(shape: tuple[int, ...], eps: float, seed: int) -> None:
    """Outside the ball, the nearest point is soft thresholding by the one threshold that leaves norm eps."""
    z, _, x = pair(seed, shape, 3.0)
    d, p = (z - x).flatten(1), (project(z, x, norm="L1-exact", eps=eps) - x).flatten(1)
    for delta, found in zip(d, p, strict=True):
        if delta.abs().sum() <= eps:
            torch.testing.assert_close(found, delta, rtol=0, atol=1e-14)
            continue
        low, high = 0.0, float(delta.abs().max())
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if float((delta.abs() - middle).clamp(min=0).sum()) > eps else (low, middle)
        torch.testing.assert_close(found, delta.sign() * (delta.abs() - low).clamp(min=0), rtol=0, atol=1e-12)


@given(shape=shapes, eps=radii, seed=seeds, norm=st.sampled_from(NORMS))
def test_clip_after_the_ball_stays_in_the_ball(shape: tuple[int, ...], eps: float, seed: int, norm: str) -> None:
    z, _, x = pair(seed, shape, 3.0)
    x = x.clamp(-1, 1)
    p = project(z, x, norm=norm, eps=eps, clip=(-1, 1))
    assert (p.abs() <= 1).all()
    assert (per_sample_norm(p - x, norm) <= eps + 1e-12).all()


def test_ball_and_clip_as_one_box_are_the_two_in_turn() -> None:
    """Also where x lies outside the clip: the clip wins."""
    x = torch.tensor([[-2.0, -0.5, 0.5, 1.5, 3.0]])
    z = x + torch.tensor([[0.9, -0.9, 0.9, -0.9, 0.0]])
    lower, upper = torch.tensor(0.0), torch.tensor(1.0)
    low, high = pgd_reference.box(x, 0.3, None, lower, upper)
    assert torch.equal(z.clamp(low, high), project(z, x, norm="Linf", eps=0.3, clip=(0, 1)))


def test_radial_l1_is_not_the_nearest_point() -> None:
    x, z = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]])
    assert project(z, x, norm=1, eps=2.0).tolist() == [[1.5, 0.5]]
    assert project(z, x, norm="L1-exact", eps=2.0).tolist() == [[2.0, 0.0]]


# -- operators --------------------------------------------------------------------------------------------------------


def operator_calls(dtype: torch.dtype) -> list[tuple]:
    x_adv, x, grad = triple(dtype)
    eps, bound = torch.rand(4), torch.zeros(3, 1, 1)
    active = torch.tensor([True, False, True, True])
    last = x_adv.to(memory_format=torch.channels_last)
    return [
        *(
            (pgd_ops.pgd_step, (x_adv, x, grad, n, 0.1, 0.2, None, None, None, None, False, None))
            for n in CANONICAL.values()
        ),
        (pgd_ops.pgd_step, (last, x, grad, "2", 0.0, 0.0, eps, eps, bound, None, True, active)),
        (pgd_ops.pgd_step, (last, x, grad, "inf", math.inf, 0.1, None, None, x - 1, x + 1, False, None)),
        (wrm_ops.wrm_step, (last, x, grad, 0.1, None, 0.5, bound, bound + 1)),
        (wrm_ops.wrm_step, (x_adv, x, grad, 0.0, eps, 1.0, None, None)),
        *((pgd_ops.project, (last, x, n, 0.1, None, None, bound)) for n in CANONICAL.values()),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    for op, args in operator_calls(dtype):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_step_compiles_in_one_graph(norm: str) -> None:
    batch = triple()

    def step(x_adv: Tensor, x: Tensor, grad: Tensor, alpha: Tensor) -> Tensor:
        return pgd_step(x_adv, x, grad * 2, norm=norm, eps=0.3, alpha=alpha, clip=(0, 1), active=alpha > 0.1) + 1

    alpha = torch.tensor([0.05, 0.2, 0.3, 0.4])
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert same_bits(compiled(*batch, alpha), step(*batch, alpha))
