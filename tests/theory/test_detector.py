"""The detector on a small task where attacks show, and the attack that knows it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sn_fast.attacks import pgd
from sn_fast.theory import AmplificationDetector

EPS = 2.3
"""Somewhat more than the distance of the two classes: attacked samples lie behind the other class, or within it."""


@pytest.fixture(scope="module")
def task() -> tuple[nn.Module, Tensor, Tensor]:
    """Two clusters two apart, and a network that tells them apart."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 2, (400,), generator=generator)
    x = (2.0 * y - 1)[:, None] * torch.tensor([1.0, 0, 0, 0]) + 0.1 * torch.randn(400, 4, generator=generator)
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model, x, y


@pytest.mark.parametrize("direction", ["gradient", "noise"])
def test_attacks_are_told_from_clean_samples(task, direction):
    model, x, y = task
    attacked = pgd(model, x, y, eps=EPS, steps=10)
    assert float((model(attacked).argmax(1) != y).double().mean()) > 0.99
    detector = AmplificationDetector(model, length=0.02, direction=direction).fit(x[:200], attacked[:200])
    seen = detector.auroc(x[200:], attacked[200:])
    assert seen > 0.95
    assert detector.auroc(x[200:], x[200:]) == pytest.approx(0.5)
    assert detector.auroc(attacked[200:], x[200:]) == pytest.approx(1 - seen)
    scores = detector.score(x[200:])
    pairs = scores[None, :] < detector.score(attacked[200:])[:, None]
    assert seen == pytest.approx(float(pairs.double().mean()), abs=1e-3)
    # The score of a sample is its own, whatever is beside it; and the same at every call.
    assert torch.allclose(detector.score(x[205:206]), scores[5:6], atol=1e-3)
    assert torch.equal(detector.score(x[200:]), scores)
    assert detector.signals(x[:7]).shape == (7, 6)


@pytest.mark.parametrize("direction", ["gradient", "noise"])
def test_an_attack_that_knows_the_detector_hides_from_it(task, direction):
    model, x, y = task
    attacked = pgd(model, x, y, eps=EPS, steps=10)
    detector = AmplificationDetector(model, length=0.02, direction=direction).fit(x[:200], attacked[:200])
    rest = slice(200, 260)
    hidden = detector.attack(x[rest], y[rest], eps=EPS, steps=30)
    assert float((hidden - x[rest]).norm(dim=1).max()) <= EPS * (1 + 1e-5)
    assert float((model(hidden).argmax(1) != y[rest]).double().mean()) > 0.9
    assert detector.auroc(x[rest], attacked[rest]) > 0.95
    assert detector.auroc(x[rest], hidden) < 0.2
    # With no weight on the detector it is an attack on the network alone.
    plain = detector.attack(x[rest], y[rest], eps=EPS, steps=30, weight=0.0)
    assert detector.auroc(x[rest], plain) > 0.9


def test_the_network_is_left_alone(task):
    model, x, y = task
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    detector = AmplificationDetector(model, length=0.02).fit(x[:50], x[:50] + 0.5)
    detector.attack(x[:5], y[:5], eps=0.5, steps=2)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_samples_that_are_not_finite_are_named(task):
    model, x, _ = task
    attacked = x + 0.1
    attacked[3] = torch.nan
    with pytest.raises(ValueError, match="attacked has samples at which activations of the network are not finite"):
        AmplificationDetector(model, length=0.1).fit(x, attacked)


def test_bad_input(task, uninstalled):
    model, x, y = task
    with pytest.raises(ValueError, match="length=0 must be a finite number > 0"):
        AmplificationDetector(model, length=0)
    with pytest.raises(ValueError, match="direction='label' is unknown"):
        AmplificationDetector(model, length=0.1, direction="label")
    with pytest.raises(TypeError, match="model is a function"):
        AmplificationDetector(lambda x: x, length=0.1)
    detector = AmplificationDetector(model, length=0.1)
    for call in (lambda: detector.score(x), lambda: detector.attack(x, y, eps=0.1)):
        with pytest.raises(RuntimeError, match=r"has not been fitted: call fit\(clean, attacked\) first"):
            call()
    with pytest.raises(ValueError, match="x has no samples"):
        detector.signals(x[:0])
    uninstalled("sklearn")
    with pytest.raises(Exception, match="the package sklearn is not installed"):
        detector.fit(x[:5], x[5:10])
