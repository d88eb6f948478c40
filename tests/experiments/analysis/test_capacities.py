"""Capacities of linear networks, whose Phi is known in closed form, beside gaps of the test's choice."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

from sn_fast.errors import OptionError
from sn_fast.experiments.analysis import capacities
from sn_fast.experiments.data import Samples
from sn_fast.experiments.reproduction import Outcome
from sn_fast.experiments.training import TrainedNetwork
from sn_fast.theory import gradient_norms

from .figure_checks import check_files
from .outcomes import outcome
from .test_networks import W, opposite


@pytest.fixture
def samples() -> Samples:
    """Images that ``opposite(W)`` has right, with margins that differ."""
    x = torch.randn(201, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    return Samples(x, (x.flatten(1) @ W < 0).long())


def member(weight: Tensor, gap: float, **options: Any) -> tuple[Outcome, TrainedNetwork]:
    run = outcome(0.5 + gap, test=0.5, eps=0.25, **options)
    return run, TrainedNetwork(run.config, run.config.beta, (1, 2, 2), 2, opposite(weight).eval())


def test_a_linear_classifier(samples: Samples) -> None:
    """Phi of ERM is ||W||_F^2; margins are 2 |w x|, under FGM less by the step, and L = sigma^2."""
    result = capacities([member(W, 0.2, scheme="erm", train_size=500), member(W, 0.1, random_labels=1.0)], samples)
    erm, fgm = result.networks
    lead = 2 * (samples.x.flatten(1) @ W).abs()
    square = 2 * float(W @ W)  # of both norms: the rows are parallel
    assert erm.log10_capacity == pytest.approx(math.log10(square), rel=1e-5)
    assert erm.margin == pytest.approx(float(lead.median()), rel=1e-5)
    assert erm.log10_complexity == pytest.approx(math.log10(square / erm.margin**2), rel=1e-5)
    assert (erm.gap, erm.kappa, erm.training_images, erm.random_labels) == (pytest.approx(0.2), None, 500, 0.0)

    moved = lead - 2 * 0.25 * float(W.norm())
    kappa = float(gradient_norms(opposite(W), samples.x, samples.y).quantile(0.05))
    assert fgm.margin == pytest.approx(float(moved[moved > 0].median()), rel=1e-5)
    assert fgm.kappa == pytest.approx(kappa, rel=1e-6)
    assert fgm.attack_factor == pytest.approx(1 + 0.25 / kappa * square, rel=1e-5)
    assert fgm.log10_capacity == pytest.approx(math.log10(square * fgm.attack_factor**2), rel=1e-5)
    assert (fgm.training_images, fgm.random_labels) == (None, 1.0)


def test_rank_correlation_is_that_of_the_pairs(samples: Samples, tmp_path: Any) -> None:
    """A direction of norm c has the capacity c^2 and the margin c: of one direction all have the same complexity."""
    weights = [W, W + torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, -2.0, 0.0, 0.0]), W.abs()]
    gaps = [0.1, 0.3, 0.2, 0.25]
    members = [member(w, gap, scheme="erm", beta=b) for w, gap, b in zip(weights, gaps, (math.inf, 3.0, 2.0, 1.0))]
    result = capacities(members, samples)
    found = [(n.log10_complexity or 0.0, n.gap) for n in result.networks]
    signs = [(a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in combinations(found, 2)]
    assert 0 < sum(signs) < len(signs)
    assert result.rank_correlation("erm") == pytest.approx((2 * sum(signs) - len(signs)) / len(signs))
    assert result.rank_correlation("fgm") is None
    noisy = capacities([member(W, 0.4, scheme="erm", random_labels=1.0)], samples)
    check_files(type(result)(result.networks + noisy.networks), tmp_path)


def test_no_margin_no_complexity(samples: Samples) -> None:
    (network,) = capacities([member(-W, 0.0, scheme="erm")], samples).networks
    assert network.log10_complexity is None
    ((*_, margin, _, _, complexity, _, _, _, _),) = capacities([member(-W, 0.0, scheme="erm")], samples).rows()
    assert margin is None
    assert complexity is None


def test_each_run_on_its_own_images(samples: Samples) -> None:
    members = [member(W, 0.2, scheme="erm", seed=0), member(W, 0.1, scheme="erm", seed=1)]
    halves = Samples(samples.x[:101], samples.y[:101]), Samples(samples.x[100:], samples.y[100:])
    result = capacities(members, lambda outcome: halves[outcome.config.seed])
    for network, half in zip(result.networks, halves):
        assert network.margin == pytest.approx(float((2 * half.x.flatten(1) @ W).abs().median()), rel=1e-5)


def test_gradients_that_vanish_give_no_finite_capacity(samples: Samples) -> None:
    """In float32 the gradient of a network that is sure of every label is exactly zero."""
    (network,) = capacities([member(1e5 * W, 0.1)], samples).networks
    assert network.kappa == 0
    assert network.log10_capacity == math.inf
    assert network.notes.startswith("kappa is 0: 5% of the gradients vanish; the theorem needs kappa > 0")


def test_arguments(samples: Samples) -> None:
    with pytest.raises(OptionError, match="members"):
        capacities([], samples)
    with pytest.raises(OptionError, match="samples"):
        capacities([member(W, 0.1)], Samples(samples.x[:0], samples.y[:0]))
