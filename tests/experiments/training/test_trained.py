from __future__ import annotations

import math

import pytest
import torch

from sn_fast.experiments.data import load_split
from sn_fast.experiments.training import UserError, trained_networks
from sn_fast.experiments.training.evaluate import accuracy


@pytest.mark.parametrize("arch", ["demo", "mlp1_elu_sn"])
def test_the_networks_of_a_run_are_those_that_it_evaluated(tiny_run, arch):
    result = tiny_run(arch=arch)
    split = load_split("digits", result.config.train_size, result.config.seed)
    networks = trained_networks(result.path)
    assert [network.beta for network in networks.values()] == [math.inf, result.config.beta]
    for name, network in networks.items():
        assert not network.model.training
        measured = result.metrics["networks"][name]["final"]["accuracy"]["train"]["clean"]
        with torch.no_grad():
            assert accuracy(network.model(split.train.x), split.train.y) == pytest.approx(measured, abs=1e-12)


def test_a_run_without_a_checkpoint_has_none(tiny_run):
    result = tiny_run()
    (result.path / "checkpoint.pt").unlink()
    with pytest.raises(UserError, match=r"has no checkpoint\.pt yet"):
        trained_networks(result.path)
