"""normalization="projection": plain networks whose weights are scaled back after each step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sn_fast.experiments.networks import layer_norms
from sn_fast.experiments.training import Interrupted, TrainConfig, UserError, resume, train, trained_networks
from sn_fast.experiments.training.loop import Trainee

from .conftest import TINY, without_times

LAYERS = ("conv1", "conv2", "conv3", "fc")


@pytest.mark.slow
def test_an_interrupted_run_goes_on_bit_by_bit(
    few_digits: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig.create(**TINY, normalization="projection", beta=0.5, single=True)
    whole = train(config, tmp_path / "whole")
    real = Trainee.train_epoch

    def interrupted(self: Trainee, samples: Any, epoch: int, bar: Any) -> Any:
        if epoch == 2:
            raise KeyboardInterrupt
        return real(self, samples, epoch, bar)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "train_epoch", interrupted)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "parts")
    again = resume(tmp_path / "parts")
    assert without_times(again.metrics) == without_times(whole.metrics)
    states = [
        torch.load(path / "checkpoint.pt", weights_only=True)["networks"]["beta=0.5"]
        for path in (whole.path, again.path)
    ]
    network = trained_networks(again.path)["beta=0.5"].model
    assert list(network.state_dict()) == [f"{n}.{key}" for n in LAYERS for key in ("weight", "bias")]
    for part in ("model", "projection"):
        assert states[0][part].keys() == states[1][part].keys()
        assert all(torch.equal(t, states[1][part][key]) for key, t in states[0][part].items())


def test_the_norms_are_within_beta() -> None:
    x, y = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    norms = []
    for beta in (0.5, math.inf):
        config = TrainConfig.create(**{**TINY, "steps": 1}, normalization="projection", beta=0.5)
        trainee = Trainee.create(beta, (1, 8, 8), 10, config)
        assert (trainee.projection is None) == math.isinf(beta)
        for _ in range(5):
            trainee.train_step(x, y, lr=0.05)
        norms.append(layer_norms(trainee.model, (1, 8, 8)))
    for name in LAYERS:
        assert norms[0][name] <= 0.5 * 1.05
        assert norms[1][name] > 0.6


def test_published_networks_are_projected_by_their_operator() -> None:
    config = TrainConfig.create(
        data="mnist", data_dir="none", arch="alexnet_miyato_sn", beta=0.7, normalization="projection", device="cpu"
    )
    trainee = Trainee.create(0.7, (1, 28, 28), 10, config)
    assert trainee.projection is not None
    for module in trainee.model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.ndim > 1:
            assert torch.linalg.matrix_norm(weight.detach().flatten(1), 2) <= 0.7 * 1.02


def test_another_name_is_refused() -> None:
    with pytest.raises(UserError, match=r"normalization='weights'.*choose parametrization or projection"):
        TrainConfig.create(normalization="weights")
