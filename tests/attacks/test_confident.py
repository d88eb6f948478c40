"""Models that are sure of their labels: a saturated loss still has a direction."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sn_fast.attacks import fgm, pgd, wrm
from sn_fast.attacks.task import Task

from .models import per_sample_norm

N, D, CLASSES = 32, 20, 6


def sure_model(margin: float, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A smooth model in float64 whose logit of y is ``margin`` above the next at each x, up to rounding of x."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=generator, dtype=torch.float64).bfloat16().double()
    model = nn.Sequential(nn.Linear(D, 24), nn.Tanh(), nn.Linear(24, CLASSES)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64).bfloat16() * 0.25)
        top = model(x).topk(2, dim=1)
        # A factor would not do for all samples at once; the nearest to a draw gets the margin wanted.
        gap = (top.values[:, 0] - top.values[:, 1]).median()
        factor = 2.0 ** round(math.log2(margin / float(gap)))
        model[2].weight *= factor
        model[2].bias *= factor
    return model, x, top.indices[:, 0]


def exact_direction(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of the cross entropy's gradient in x, from the logarithm of the odds against y, in float64."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    others = logits.scatter(1, y[:, None], -math.inf)
    odds = others.logsumexp(dim=1) - logits.gather(1, y[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(odds.sum(), leaf)
    return F.normalize(gradient, dim=1)


@pytest.mark.parametrize("margin", [5.0, 11.0, 20.0, 40.0, 60.0, 90.0, 300.0])
@pytest.mark.parametrize(
    ("dtype", "autocast", "least"),
    [
        (torch.float32, None, 1 - 1e-6),
        (torch.float64, None, 1 - 1e-12),
        (torch.float16, None, 0.99),
        (torch.bfloat16, None, 0.9),
        (torch.float32, torch.float16, 0.99),
        (torch.float32, torch.bfloat16, 0.9),
    ],
)
def test_every_sample_moves_in_the_exact_direction(
    margin: float, dtype: torch.dtype, autocast: torch.dtype | None, least: float
) -> None:
    model, x, y = sure_model(margin)
    wanted = exact_direction(model, x, y)
    # Logits of low precision have ties: who comes second is then the precision's choice.
    low = model.to(dtype)
    for attack in (
        lambda z: fgm(low, z, y, norm=2, eps=0.5, autocast_dtype=autocast),
        lambda z: pgd(low, z, y, norm=2, eps=0.5, steps=1, autocast_dtype=autocast),
    ):
        delta = (attack(x.to(dtype)) - x.to(dtype)).double()
        assert per_sample_norm(delta, "L2").min() > 0.45
        cosine = (F.normalize(delta, dim=1) * wanted).sum(dim=1)
        assert cosine.median() >= least
        assert cosine.min() >= (least if dtype in (torch.float32, torch.float64) and autocast is None else 0.5)


@pytest.mark.parametrize("margin", [11.0, 40.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_norm_and_no_option_leaves_a_sample_where_it_is(margin: float, dtype: torch.dtype) -> None:
    model, x, y = sure_model(margin)
    model, x = model.to(dtype), x.to(dtype)
    for norm in ("Linf", "L2", "L1", "L1-exact"):
        for options in ({}, {"keep_best": True}, {"early_stop": True}, {"clip": (-4, 4)}):
            x_adv = pgd(model, x, y, norm=norm, eps=1.0, steps=3, **options)
            moved = (x_adv != x).any(dim=1)
            correct = model(x).argmax(dim=1) == y
            assert moved[correct].all()


def test_keep_best_and_restarts_compare_saturated_losses() -> None:
    model, x, y = sure_model(300.0)
    model, x = model.float(), x.float()

    def odds(z: Tensor) -> Tensor:
        logits = model(z)
        return logits.scatter(1, y[:, None], -math.inf).logsumexp(dim=1) - logits.gather(1, y[:, None])[:, 0]

    for options in ({"keep_best": True}, {"random_start": True, "restarts": 3}):
        x_adv, info = pgd(model, x, y, eps=0.5, steps=5, return_info=True, **options)
        assert (info.loss >= 0).all()
        assert (odds(x_adv) > odds(x)).all()


def test_targeted_goes_on_where_the_target_is_sure() -> None:
    model, x, y = sure_model(60.0)
    model, x = model.float(), x.float()
    x_adv = fgm(model, x, y, norm=2, eps=0.5, targeted=True)
    cosine = (F.normalize((x_adv - x).double(), dim=1) * -exact_direction(model.double(), x.double(), y)).sum(dim=1)
    assert cosine.min() > 1 - 1e-6


@pytest.mark.parametrize("margin", [-60.0, -1.0, 3.0, 15.0, 30.0, 90.0, 500.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pull_is_the_gradient_of_the_loss_up_to_a_factor(margin: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (8,), generator=generator)
    others = logits.scatter(1, y[:, None], -math.inf)
    logits = logits.scatter(1, y[:, None], others.amax(dim=1, keepdim=True) + margin).to(dtype)
    losses, pull = Task("ce").losses_and_pull(logits, y)
    assert torch.equal(losses, F.cross_entropy(logits, y, reduction="none"))
    pull = pull.double()
    exact = logits.double().scatter(1, y[:, None], -math.inf).softmax(dim=1).scatter(1, y[:, None], -1.0)
    scale = -pull.gather(1, y[:, None])
    assert (scale > 0).all()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(pull / scale, exact, rtol=tolerance, atol=tolerance)
    if margin < 3:  # bit for bit the published gradient
        leaf = logits.clone().requires_grad_()
        (plain,) = torch.autograd.grad(F.cross_entropy(leaf, y, reduction="sum"), leaf)
        assert torch.equal(pull, plain.double())


def test_logits_that_are_not_finite_do_not_spread() -> None:
    logits = torch.tensor(
        [[1.0, -math.inf, 2.0], [3.0, -math.inf, -math.inf], [math.nan, 0.0, 0.0], [math.inf, 0.0, 1.0]]
    )
    _, pull = Task("ce").losses_and_pull(logits, torch.tensor([0, 0, 0, 1]))
    assert pull.isfinite().all()
    torch.testing.assert_close(pull[0] / pull[0, 2], torch.tensor([-1.0, 0.0, 1.0]))
    assert not pull[1].any()  # one class that can be: its loss is 0 everywhere


def test_one_logit_does_not_saturate_either() -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(D, generator=generator)
    x = torch.randn(N, D, generator=generator)
    for dtype, scale in ((torch.float32, 50.0), (torch.float16, 8.0), (torch.bfloat16, 50.0)):
        weight = (scale * w).to(dtype)
        z = x.to(dtype)
        y = (z @ weight > 0).long()
        x_adv = fgm(lambda a, weight=weight: a @ weight, z, y, norm=2, eps=0.5, loss="bce")
        wanted = (1 - 2 * y)[:, None] * F.normalize(w, dim=0)
        cosine = F.cosine_similarity((x_adv - z).float(), wanted)
        assert cosine.min() > 0.999


def test_wrm_keeps_to_the_bare_gradient() -> None:
    model, x, y = sure_model(5.0)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    first = wrm(model, x, y, eps=0.3, steps=1)
    leaf = (x + 0.3 * gradient).requires_grad_()
    (second,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    z = x + 0.3 * gradient
    torch.testing.assert_close(first, z + (0.3 * second - (z - x)) / math.sqrt(2), rtol=0, atol=1e-13)


def test_callable_losses_are_used_as_they_are() -> None:
    model, x, y = sure_model(300.0)
    model, x = model.float(), x.float()
    x_adv = pgd(model, x, y, eps=0.5, loss=lambda logits, y: F.cross_entropy(logits, y, reduction="none"))
    assert (x_adv == x).all(dim=1).sum() > N / 2
