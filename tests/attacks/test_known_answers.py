"""Attacks on losses whose worst case is known in closed form, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sn_fast.attacks import fgm, pgd, wrm

N, D = 5, 12
DUAL = {"Linf": 1, "L2": 2}


def logistic(w: Tensor, b: float):
    """A linear score, and the loss softplus(-y score) with labels y = ±1."""
    return (lambda x: x @ w + b), (lambda score, y: F.softplus(-y * score))


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(D, dtype=torch.float64),
        torch.randn(N, D, dtype=torch.float64),
        torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64),
    )


def worst_delta(w: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "Linf":
        return -eps * y[:, None] * w.sign()
    if norm == "L2":
        return -eps * y[:, None] * w / w.norm()
    if norm == "L1":  # the paper's direction: in the l1 ball, but not the worst
        return -eps * y[:, None] * w / w.abs().sum()
    return -eps * y[:, None] * w.sign() * F.one_hot(w.abs().argmax(), D)


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1", "L1-exact"])
def test_logistic_loss_is_attacked_exactly(problem, norm: str) -> None:
    w, x, y = problem
    model, loss = logistic(w, 0.3)
    eps = 0.7
    wanted = x + worst_delta(w, y, norm, eps)
    torch.testing.assert_close(fgm(model, x, y, norm=norm, eps=eps, loss=loss), wanted, rtol=0, atol=1e-13)
    x_adv, info = pgd(model, x, y, norm=norm, eps=eps, steps=9, loss=loss, return_info=True)
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-13)
    margin = y * (x @ w + 0.3)
    lost = {
        "Linf": eps * w.abs().sum(),
        "L2": eps * w.norm(),
        "L1": eps * w.square().sum() / w.abs().sum(),
        "L1-exact": eps * w.abs().max(),
    }
    torch.testing.assert_close(info.loss, F.softplus(-(margin - lost[norm])), rtol=1e-12, atol=0)
    assert lost["L1"] < lost["L1-exact"]


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1", "L1-exact"])
def test_short_of_the_ball_the_attack_goes_as_far_as_its_steps(problem, norm: str) -> None:
    w, x, y = problem
    model, loss = logistic(w, 0.3)
    x_adv = pgd(model, x, y, norm=norm, eps=0.7, alpha=0.1, steps=4, loss=loss)
    torch.testing.assert_close(x_adv, x + worst_delta(w, y, norm, 0.4), rtol=0, atol=1e-13)


def test_linf_and_box_have_a_closed_form(problem) -> None:
    w, x, y = problem
    x = x.sigmoid()
    model, loss = logistic(w, 0.0)
    x_adv = pgd(model, x, y, norm="Linf", eps=0.4, steps=10, loss=loss, clip=(0, 1))
    wanted = (x + worst_delta(w, y, "Linf", 0.4)).clamp(0, 1)
    torch.testing.assert_close(x_adv, wanted, rtol=0, atol=1e-14)


def test_l2_and_box_are_approached_in_proportion_to_alpha(problem) -> None:
    """The optimum is clip(x - t y w, 0, 1) with |delta| = eps; alternating projections come within O(alpha) of it."""
    w, x, y = problem
    x, eps = x.sigmoid(), 0.6
    model, loss = logistic(w, 0.0)
    low, high = torch.zeros(N, 1, dtype=torch.float64), torch.full((N, 1), 50.0, dtype=torch.float64)
    for _ in range(200):
        t = (low + high) / 2
        best = (x - t * y[:, None] * w).clamp(0, 1)
        far = (best - x).norm(dim=1, keepdim=True) > eps
        low, high = torch.where(far, low, t), torch.where(far, t, high)
    optimum = loss(model(best), y)
    gaps = []
    for alpha in (0.2, 0.02):
        _, info = pgd(
            model, x, y, norm=2, eps=eps, alpha=alpha, steps=round(8 / alpha), loss=loss, clip=(0, 1), return_info=True
        )
        gap = optimum - info.loss
        assert (gap >= -1e-12).all()
        gaps.append(float(gap.max()))
    assert gaps[0] < 0.1
    assert gaps[1] < 0.2 * gaps[0]


@pytest.mark.parametrize("steps", [1, 15])
def test_wrm_of_a_linear_loss_is_one_gradient(problem, steps: int) -> None:
    c, x, y = problem
    x_adv = wrm(lambda x: x @ c, x, y, eps=0.3, steps=steps, loss=lambda score, y: score)
    torch.testing.assert_close(x_adv, x + 0.3 * c, rtol=0, atol=1e-14)


def test_wrm_of_a_quadratic_loss_has_a_known_error_after_every_step(problem) -> None:
    c, x, y = problem
    h, eps = 1.5, 0.2

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return h / 2 * (z - c).square().sum(dim=1)

    worst = eps * h / (1 - eps * h) * (x - c)
    for steps in (1, 2, 7, 15):
        x_adv = wrm(lambda x: x, x, y, eps=eps, steps=steps, loss=loss)
        factor = -(eps * h) * math.prod(1 - (1 - eps * h) / math.sqrt(t + 2) for t in range(steps))
        torch.testing.assert_close(x_adv - x - worst, factor * worst, rtol=0, atol=1e-13)


def test_wrm_of_the_logistic_loss_converges_to_its_fixed_point(problem) -> None:
    w, x, y = problem
    eps = 0.5 / float(w.square().sum())
    model, loss = logistic(w, 0.1)
    margin = y * (x @ w + 0.1)
    s = torch.zeros(N, dtype=torch.float64)
    for _ in range(500):
        s = eps * torch.sigmoid(-(margin - s * w.square().sum()))
    wanted = x - (y * s)[:, None] * w
    torch.testing.assert_close(wrm(model, x, y, eps=eps, steps=400, loss=loss), wanted, rtol=0, atol=1e-8)
    torch.testing.assert_close(wrm(model, x, y, gamma=0.5 / eps, steps=400, loss=loss), wanted, rtol=0, atol=1e-8)


def test_targeted_wrm_descends(problem) -> None:
    c, x, y = problem
    x_adv = wrm(lambda x: x @ c, x, y, eps=0.3, steps=3, loss=lambda score, y: score, targeted=True)
    torch.testing.assert_close(x_adv, x - 0.3 * c, rtol=0, atol=1e-14)
