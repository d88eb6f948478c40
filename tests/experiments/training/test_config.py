from __future__ import annotations

import json
import math

import pytest

from sn_fast.experiments.training import TrainConfig, UserError


@pytest.mark.parametrize("data", ["digits", "mnist5k"])
@pytest.mark.parametrize("scheme", ["erm", "fgm", "pgm", "wrm"])
@pytest.mark.parametrize("norm", ["2", "inf", "1"])
def test_every_combination_has_defaults_that_pass_the_checks(data, scheme, norm):
    config = TrainConfig.create(data=data, scheme=scheme, norm=norm)
    assert config.betas == (math.inf, config.beta)
    assert config.device in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"data": "cifar"}, "argument --data: cifar will not do: choose digits or mnist5k"),
        ({"scheme": "pgd"}, "argument --scheme: pgd will not do: choose erm, fgm, pgm or wrm"),
        ({"norm": "3"}, "argument --norm: 3 will not do: choose 2, inf or 1"),
        ({"attack_labels": "false"}, "argument --attack-labels: false will not do: choose true or predicted"),
        ({"eps": 0.0}, "argument --eps: 0.0 will not do: give a finite number > 0"),
        ({"eps": -1.0}, "argument --eps: -1.0 will not do: give a finite number > 0"),
        ({"eps": math.nan}, "argument --eps: nan will not do: give a finite number > 0"),
        ({"lr": math.inf}, "argument --lr: inf will not do: give a finite number > 0"),
        ({"beta": 0.0}, "argument --beta: 0.0 will not do: give a number > 0"),
        ({"beta": math.nan}, "argument --beta: nan will not do: give a number > 0"),
        ({"beta": math.inf}, "argument --beta: inf will not do: the comparison is with inf; give a finite number"),
        ({"epochs": 0}, "argument --epochs: 0 will not do: give an integer >= 1"),
        ({"steps": 0}, "argument --steps: 0 will not do: give an integer >= 1"),
        ({"batch_size": -5}, "argument --batch-size: -5 will not do: give an integer >= 1"),
        ({"train_size": 0}, "argument --train-size: 0 will not do: give an integer >= 1"),
        ({"threads": 0}, "argument --threads: 0 will not do: give an integer >= 1"),
        ({"seed": -1}, "argument --seed: -1 will not do: give an integer from 0 to"),
        ({"device": "tpu"}, "argument --device: tpu will not do: choose auto, cpu or cuda"),
    ],
)
def test_bad_options_are_refused_by_name_value_and_remedy(options, expected):
    with pytest.raises(UserError) as caught:
        TrainConfig.create(**options)
    assert str(caught.value).startswith(expected)


def test_cuda_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"argument --device: cuda .* give --device cpu"):
        TrainConfig.create(device="cuda")
    assert TrainConfig.create(device="auto").device == "cpu"


def test_eps_belongs_to_the_scheme_and_the_other_kind_keeps_its_default():
    default = TrainConfig.create()
    ball = TrainConfig.create(scheme="fgm", eps=0.123)
    assert [ball.adversary(s).eps for s in ("fgm", "pgm")] == [0.123, 0.123]
    assert ball.adversary("wrm") == default.adversary("wrm")
    transport = TrainConfig.create(scheme="wrm", eps=0.321)
    assert transport.adversary("wrm").eps == 0.321
    assert transport.adversary("pgm") == default.adversary("pgm")


def test_single_trains_one_network_which_may_be_the_plain_one():
    assert TrainConfig.create(beta=2.0, single=True).betas == (2.0,)
    assert TrainConfig.create(beta=math.inf, single=True).betas == (math.inf,)


def test_norms_may_be_numbers():
    assert TrainConfig.create(norm=2) == TrainConfig.create(norm="2")
    assert TrainConfig.create(norm=math.inf) == TrainConfig.create(norm="inf")


def test_a_configuration_survives_json():
    for options in ({}, {"beta": math.inf, "single": True}, {"scheme": "wrm", "norm": "inf", "eps": 0.1}):
        config = TrainConfig.create(**options)
        text = json.dumps(config.to_json(), allow_nan=False)
        assert TrainConfig.from_json(json.loads(text)) == config


def test_only_equal_options_may_be_repeated_on_resume():
    config = TrainConfig.create(epochs=5)
    config.refuse_changes({"epochs": 5, "beta": None, "device": "auto"})
    with pytest.raises(UserError, match="argument --epochs: 6 will not do: the run to resume has 5"):
        config.refuse_changes({"epochs": 6})
