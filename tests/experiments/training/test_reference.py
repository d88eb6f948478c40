from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sn_fast.attacks import fgm
from sn_fast.experiments.training import TrainConfig
from sn_fast.experiments.training.loop import Trainee
from sn_fast.experiments.training.reference import published_fgm

EPS = 0.3
SLOPE = 700.0  # of the margin in the input


def model(margin: float) -> nn.Module:
    """Two logits, a margin apart at 0, on 28 x 28 images; the margin's gradient has length SLOPE."""
    layer = nn.Linear(784, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.stack((torch.full((784,), SLOPE / 56), torch.full((784,), -SLOPE / 56))))
        layer.bias.copy_(torch.tensor([margin / 2, -margin / 2]))
    return nn.Sequential(nn.Flatten(), layer)


def lengths(attack, margin: float) -> float:
    x = torch.zeros(3, 1, 28, 28)
    return float((attack(model(margin), x, torch.zeros(3, dtype=torch.long), norm="2", eps=EPS) - x)[0].norm())


@pytest.mark.parametrize("margin", [1.0, 20.0, 40.0, 47.0, 55.0, 60.0, 80.0])
def test_the_step_has_length_eps_at_every_margin_and_as_published_it_blows_up_and_vanishes(margin: float) -> None:
    assert lengths(fgm, margin) == pytest.approx(EPS, rel=1e-4)
    published = lengths(published_fgm, margin)
    if margin <= 40:
        assert published == pytest.approx(EPS, rel=1e-3)
    else:  # the squares are 0 (at 47 because subnormal numbers are flushed); float32 keeps the wrong class's gradient
        assert published == pytest.approx(EPS * math.exp(-margin) * SLOPE / 2 / 1e-24, rel=1e-3)
        assert published > 100 * EPS or margin > 55


@pytest.mark.parametrize("norm", ["2", "inf", "1"])
def test_both_agree_where_nothing_underflows(norm: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ELU(), nn.Linear(8, 4))
    x = torch.randn(5, 1, 3, 4)
    torch.testing.assert_close(
        published_fgm(network, x, norm=norm, eps=EPS), fgm(network, x, norm=norm, eps=EPS), rtol=1e-5, atol=1e-6
    )


def test_the_switch_is_of_training() -> None:
    config = TrainConfig.create(scheme="fgm", reference=True, weight_decay=0.1)
    trainee = Trainee.create(2.0, (1, 8, 8), 10, config)
    assert [group["weight_decay"] for group in trainee.optimizer.param_groups] == [0.2, 0.0]
    assert config.training_adversary.reference
    plain = Trainee.create(2.0, (1, 8, 8), 10, TrainConfig.create(scheme="fgm", weight_decay=0.1))
    assert [group["weight_decay"] for group in plain.optimizer.param_groups] == [0.1, 0.0]
    erm = Trainee.create(2.0, (1, 8, 8), 10, TrainConfig.create(scheme="erm", reference=True, weight_decay=0.1))
    assert [group["weight_decay"] for group in erm.optimizer.param_groups] == [0.1, 0.0]
