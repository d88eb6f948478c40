"""The true l1 attack within a clip, against the maximum of a linear loss over ball and clip."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sn_fast.attacks import fgm, pgd, pgd_step

from .models import conv_net, per_sample_norm, same_bits, samples

SHAPE = (3, 6, 7)


def drawn(seed: int, batch: int = 5, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model of two classes, samples in [0, 1], labels, and the gradient of the loss at each up to a factor."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, math.prod(SHAPE), generator=generator, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 2, bias=False)).to(dtype)
    with torch.no_grad():
        model[1].weight.copy_(weight)
    x = torch.rand(batch, *SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(2, (batch,), generator=generator)
    w = model[1].weight.detach().double()
    return model, x, y, (w[1 - y] - w[y]).reshape(x.shape)


def best_gain(g: Tensor, x: Tensor, eps: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The largest <g, d> with |d|_1 <= eps and low <= x + d <= high: the steepest elements first, to their bounds."""
    gains = []
    for g1, x1, eps1, low1, high1 in zip(
        g.flatten(1), x.double().flatten(1), eps, low.flatten(1), high.flatten(1), strict=True
    ):
        left, gain = float(eps1), 0.0
        for i in g1.abs().argsort(descending=True).tolist():
            step = min(left, float(high1[i] - x1[i]) if g1[i] > 0 else float(x1[i] - low1[i]))
            gain += step * abs(float(g1[i]))
            left -= step
        gains.append(gain)
    return torch.tensor(gains, dtype=torch.float64)


CLIPS: dict[str, Callable[[Tensor], tuple]] = {
    "numbers": lambda x: (0, 1),
    "wider": lambda x: (-0.7, 1.9),
    "per channel": lambda x: ([-0.2, 0.0, -1.0], [1.0, 1.1, 3.0]),
    "per element": lambda x: (x - 0.05 - 0.3 * torch.rand_like(x), x + 0.4 * torch.rand_like(x)),
    "lower alone": lambda x: (0, math.inf),
}


def expanded(clip: tuple, x: Tensor) -> list[Tensor]:
    bounds = [torch.as_tensor(b, dtype=torch.float64) for b in clip]
    return [(b.reshape(-1, 1, 1) if b.dim() == 1 else b).expand(x.shape) for b in bounds]


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 15, 40])
@pytest.mark.parametrize("eps", [0.05, 0.9, 8.0, 30.0, 1000.0])
def test_linear_losses_are_maximised(name: str, targeted: bool, steps: int, eps: float) -> None:
    model, x, y, g = drawn(seed=round(steps * eps))
    clip = CLIPS[name](x)
    low, high = expanded(clip, x)
    labels, g = (1 - y, g) if targeted else (y, g)
    radii = torch.full((len(x),), eps, dtype=torch.float64)
    best = best_gain(g, x, radii, low, high)
    for x_adv in (
        pgd(model, x, labels, norm="L1-exact", eps=eps, steps=steps, clip=clip, targeted=targeted),
        fgm(model, x, labels, norm="L1-exact", eps=eps, clip=clip, targeted=targeted),
    ):
        torch.testing.assert_close(((x_adv - x) * g).flatten(1).sum(dim=1), best, rtol=1e-9, atol=0)
        assert (per_sample_norm(x_adv - x, "L1") <= eps * (1 + 1e-12)).all()
        assert (x_adv >= low).all()
        assert (x_adv <= high).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_lower_precision(dtype: torch.dtype) -> None:
    model, x, y, g = drawn(3, dtype=dtype)
    zeros, ones = torch.zeros_like(g), torch.ones_like(g)
    for eps in (0.3, 8.0):
        best = best_gain(g, x, torch.full((5,), eps), zeros, ones)
        for steps in (4, 15):
            x_adv = pgd(model, x, y, norm="L1-exact", eps=eps, steps=steps, clip=(0, 1))
            delta = (x_adv - x).double()
            rounding = torch.finfo(dtype).eps * 30
            assert ((delta * g).flatten(1).sum(dim=1) >= best * (1 - rounding) - 0.1 * rounding).all()
            assert (per_sample_norm(delta, "L1") <= eps * (1 + rounding)).all()
            assert x_adv.min() >= 0
            assert x_adv.max() <= 1


def test_random_start_and_small_steps_reach_the_maximum_too() -> None:
    model, x, y, g = drawn(11)
    best = best_gain(g, x, torch.full((5,), 6.0), torch.zeros_like(g), torch.ones_like(g))
    options = {"norm": "L1-exact", "eps": 6.0, "clip": (0, 1)}
    for x_adv in (
        pgd(model, x, y, random_start=True, steps=60, **options),
        pgd(model, x, y, alpha=0.05, steps=200, **options),
    ):
        assert (((x_adv - x) * g).flatten(1).sum(dim=1) >= 0.99 * best).all()


def test_per_sample_eps_and_alpha() -> None:
    model, x, y, g = drawn(5)
    eps = torch.tensor([0.0, 0.3, 2.0, 9.0, 50.0], dtype=torch.float64)
    x_adv = pgd(model, x, y, norm="L1-exact", eps=eps, steps=6, clip=(0, 1))
    best = best_gain(g, x, eps, torch.zeros_like(g), torch.ones_like(g))
    torch.testing.assert_close(((x_adv - x) * g).flatten(1).sum(dim=1), best, rtol=1e-9, atol=0)
    assert same_bits(x_adv[0], x[0])


@given(seed=st.integers(0, 2**31), eps=st.floats(0.01, 100.0), alpha=st.floats(0.0, 100.0), targeted=st.booleans())
def test_a_step_from_anywhere_stays_within_ball_and_clip(seed: int, eps: float, alpha: float, targeted: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, start, grad = torch.rand(3, 4, 30, generator=generator, dtype=torch.float64)
    grad = (grad - 0.5) * (torch.rand(4, 30, generator=generator) < 0.7)
    grad[0, :10] = torch.tensor([0.25, -0.25] * 5)  # ties
    grad[1] = 0
    options = {"norm": "L1-exact", "eps": eps, "clip": (0, 1), "targeted": targeted}
    moved = pgd_step(start, x, grad, alpha=alpha, **options)
    assert moved.isfinite().all()
    assert (per_sample_norm(moved - x, "L1") <= eps * (1 + 1e-12) + 1e-13).all()
    assert moved.min() >= 0
    assert moved.max() <= 1
    inside = x + 0.01 * (start - x) * min(1.0, eps)
    again = pgd_step(inside, x, grad, alpha=alpha, **options)
    assert same_bits(again[1], inside[1])  # a zero gradient
    assert (per_sample_norm(again - inside, "L1") <= alpha + per_sample_norm(inside - x, "L1") + 1e-12).all()
    gain = ((again - inside) * grad).sum(dim=1) * (-1 if targeted else 1)
    assert (gain >= -per_sample_norm(inside - x, "L1") * grad.abs().amax(dim=1)).all()


def test_elements_of_equal_gradient_share_in_proportion_to_their_room() -> None:
    x = torch.tensor([[0.5, 0.5, 0.9, 1.0]])
    grad = torch.tensor([[1.0, -1.0, 1.0, 1.0]])
    moved = pgd_step(x, x, grad, norm="L1-exact", eps=9.0, alpha=0.55, clip=(0, 1))
    torch.testing.assert_close(moved, torch.tensor([[0.75, 0.25, 0.95, 1.0]]))


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("clip", [(-100, 100), (-1e30, None), (None, torch.full((3,), 1e6))])
def test_a_clip_out_of_reach_changes_nothing(clip: tuple, targeted: bool) -> None:
    model = conv_net().eval()
    x, y = samples()
    options = {"norm": "L1-exact", "eps": 3.0, "steps": 5, "targeted": targeted}
    assert same_bits(pgd(model, x, y, clip=clip, **options), pgd(model, x, y, **options))
    assert same_bits(
        pgd(model, x, y, clip=clip, x_init=x + 0.01, **options), pgd(model, x, y, x_init=x + 0.01, **options)
    )


def test_non_finite_elements_do_not_spread() -> None:
    x, grad = torch.rand(2, 3, 20)
    grad[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    x[1, 4] = math.nan
    options = {"norm": "L1-exact", "eps": 2.0, "alpha": 1.5, "clip": (0, 1)}
    moved = pgd_step(x, x, grad, **options)
    assert moved.isnan().nonzero().tolist() == [[1, 4]]
    assert same_bits(moved, pgd_step(x, x, grad.nan_to_num(0.0, 0.0, 0.0), **options))
    assert (moved[2] != x[2]).any()


def test_more_than_one_saturated_pixel_in_a_network() -> None:
    """A network's attack goes on where its steepest pixels are at their bounds."""
    model = conv_net().eval()
    x, y = samples(12)
    x = x.round()  # black and white: half of the directions have no room
    losses = []
    for norm in ("L1-exact", "L1"):
        x_adv, info = pgd(model, x, y, norm=norm, eps=10.0, steps=20, clip=(0, 1), return_info=True)
        losses.append(info.loss)
        assert (per_sample_norm(x_adv - x, norm) <= 10.0 * (1 + 1e-5)).all()
    assert losses[0].mean() > losses[1].mean()
