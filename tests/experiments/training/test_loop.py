from __future__ import annotations

import math

import pytest
import torch

from sn_fast import sigmas
from sn_fast.experiments.data.samples import Samples, load_split
from sn_fast.experiments.training import TrainConfig, UserError
from sn_fast.experiments.training.adversary import Adversary
from sn_fast.experiments.training.errors import Diverged
from sn_fast.experiments.training.loop import Trainee

IMAGE = torch.Size((1, 8, 8))


class Bar:
    updates = 0
    text = ""

    def update(self, n: int) -> None:
        self.updates += n

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.text = text


def config(**options) -> TrainConfig:
    return TrainConfig.create(**{"train_size": 100, "batch_size": 30, "steps": 2, "eps": 0.3, **options})


@pytest.fixture
def samples() -> Samples:
    return load_split("digits", 100, seed=0, device=config().device).train


@pytest.mark.parametrize("scheme", ["erm", "fgm", "pgm", "wrm"])
@pytest.mark.parametrize("beta", [math.inf, 2.0])
def test_training_learns(samples, scheme, beta):
    options = config(scheme=scheme)
    trainee = Trainee.create(beta, IMAGE, 10, options)
    records = [trainee.train_epoch(samples, epoch, Bar()) for epoch in range(1, 11)]
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert records[-1]["train_accuracy"] > 0.5


def test_the_bar_moves_once_per_batch_and_says_how_it_goes(samples):
    bar = Bar()
    Trainee.create(2.0, IMAGE, 10, config()).train_epoch(samples, 3, bar)
    assert bar.updates == 4
    for part in ("beta=2", "loss 2.", "adv. acc.", "%"):
        assert part in bar.text


@pytest.mark.parametrize(("labels", "expected"), [("true", True), ("predicted", False)])
def test_attack_labels_decide_what_the_attack_is_told(samples, monkeypatch, labels, expected):
    told = []
    perturb = Adversary.perturb
    monkeypatch.setattr(Adversary, "perturb", lambda self, model, x, y: (told.append(y), perturb(self, model, x, y))[1])
    Trainee.create(2.0, IMAGE, 10, config(attack_labels=labels)).train_epoch(samples, 1, Bar())
    assert [y is not None for y in told] == [expected] * 4


def test_every_sample_is_attacked_and_the_attacked_ones_are_trained_on(samples, monkeypatch):
    """With an attack that blanks the images, nothing but the class frequencies can be learned."""
    monkeypatch.setattr(Adversary, "perturb", lambda self, model, x, y: torch.zeros_like(x))
    trainee = Trainee.create(math.inf, IMAGE, 10, config())
    for epoch in range(1, 6):
        record = trainee.train_epoch(samples, epoch, Bar())
    assert record["train_accuracy"] < 0.2


def test_sigma_in_use_follows_the_weights(samples):
    trainee = Trainee.create(2.0, IMAGE, 10, config())
    before = sigmas(trainee.model)
    trainee.train_epoch(samples, 1, Bar())
    after = sigmas(trainee.model)
    assert all(after[layer] != before[layer] for layer in before)


def test_an_infinite_loss_stops_the_epoch(samples):
    trainee = Trainee.create(math.inf, IMAGE, 10, config())
    with torch.no_grad():
        trainee.model.fc.bias[0] = math.nan
    with pytest.raises(Diverged, match="the loss became nan"):
        trainee.train_epoch(samples, 1, Bar())


def test_weights_that_the_last_step_broke_are_noticed(samples):
    options = config(batch_size=100)  # one step: its loss is that of the initial weights
    trainee = Trainee.create(math.inf, IMAGE, 10, options)
    trainee.optimizer.register_step_post_hook(lambda *_: trainee.model.fc.bias.data.fill_(math.inf))
    with pytest.raises(Diverged, match="a weight became infinite or nan"):
        trainee.train_epoch(samples, 1, Bar())


def test_dropout_depends_on_seed_and_epoch_alone(samples):
    """So that runs can be repeated and resumed, whatever else has drawn random numbers."""
    some = Samples(samples.x[:16], samples.y[:16])
    losses = {}
    for seed, first in ((0, 1), (0, 2), (1, 1)):
        options = config(arch="alexnet_dropout", single=True, beta=math.inf, scheme="erm", batch_size=16, seed=seed)
        trainee = Trainee.create(math.inf, IMAGE, 10, options)
        before = torch.get_rng_state()
        weights = {k: t.clone() for k, t in trainee.model.state_dict().items()}
        for epoch in (first, 2, first):
            trainee.model.load_state_dict(weights)
            losses.setdefault((seed, epoch), set()).add(trainee.train_epoch(some, epoch, Bar())["loss"])
            assert torch.equal(torch.get_rng_state(), before)
        torch.rand(5)
    assert {len(found) for found in losses.values()} == {1}
    assert len(losses) == len(set.union(*losses.values())) == 4


def test_images_too_small_for_the_network_are_refused():
    with pytest.raises(UserError, match=r"argument `arch`: elunet_sn: image_size: 8 x 8 is too small; layer 'conv2'"):
        Trainee.create(2.0, IMAGE, 10, config(arch="elunet_sn"))
