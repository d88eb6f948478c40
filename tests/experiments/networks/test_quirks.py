"""What crashes or misleads in the published code is absent here."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sn_fast.attacks import pgd
from sn_fast.experiments import build_network
from sn_fast.experiments.networks import parameter_groups

SMALL = {"in_channels": 1, "image_size": 16}


def adversarial_step(network: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    adversarial = pgd(network, x, norm=2, eps=0.5, steps=2)
    optimizer = torch.optim.SGD(parameter_groups(network), lr=0.01)
    F.cross_entropy(network(adversarial), y).backward()
    optimizer.step()


@pytest.mark.parametrize("nb_filters", [3, 32])
def test_elunet_of_another_width_keeps_the_batch(nb_filters: int) -> None:
    network = build_network("elunet", in_channels=1, nb_filters=nb_filters)
    assert network(torch.randn(4, 1, 28, 28)).shape == (4, 10)
    assert network.fc.in_features == 2 * nb_filters


@pytest.mark.parametrize("name", ["alexnet_snl2", "resnet_bn", "vgg_snl2", "inception_snl2"])
def test_adversarial_training_adds_no_variables(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, beta=1.0 if "_sn" in name else math.inf, seed=0, **SMALL)
    names = list(network.state_dict())
    before = copy.deepcopy(dict(network.named_parameters()))
    adversarial_step(network, torch.randn(3, 1, 16, 16), torch.tensor([0, 1, 2]))
    assert list(network.state_dict()) == names
    moved = [not torch.equal(p, before[n]) for n, p in network.named_parameters()]
    assert sum(moved) > len(moved) / 2
    if name == "resnet_bn":
        assert len(list(network.parameters())) == 98


@pytest.mark.parametrize(
    "name", ["vgg", "vgg_sn", "vgg_snl2", "inception", "inception_snl2", "resnet_bn", "alexnet_bn"]
)
def test_batch_normalisation_follows_the_mode(name: str) -> None:
    network = build_network(name, seed=0, **SMALL)
    x = torch.randn(3, 1, 16, 16)
    evaluated = network.eval()(x)
    assert not torch.allclose(network.train()(x), evaluated)
    assert not torch.allclose(network.eval()(x), evaluated)  # the moving averages have moved
    assert torch.equal(network(x), network(x))


def test_batch_normalisation_of_inception_sn_is_not_ignored() -> None:
    def count(**options: bool) -> int:
        network = build_network("inception_sn", **SMALL, **options)
        return sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())

    assert [count(), count(batch_normalization=True)] == [0, 19]


def test_dropout_ends_with_training() -> None:
    network = build_network("alexnet_dropout", seed=0, **SMALL)
    x = torch.randn(2, 1, 16, 16)
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))
    network = build_network("alexnet_dropout", seed=0, dropout_in_tests=True, **SMALL).eval()
    assert not torch.equal(network(x), network(x))


def test_weight_decay_counts_once_under_attack() -> None:
    """One step of SGD on loss + factor / 2 ||W||^2, whose gradient is taken at the adversarial images alone."""
    torch.manual_seed(0)
    network = build_network("alexnet_wd", seed=0, weight_decay=0.1, **SMALL)
    x, y = torch.randn(3, 1, 16, 16), torch.tensor([0, 1, 2])
    twin = copy.deepcopy(network)
    adversarial = pgd(twin, x, norm=2, eps=0.5, steps=2)
    penalty = sum((m.weight**2).sum() for m in twin.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    (F.cross_entropy(twin(adversarial), y) + 0.1 / 2 * penalty).backward()
    adversarial_step(network, x, y)
    for ours, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.01 * theirs.grad, rtol=0, atol=1e-6)
