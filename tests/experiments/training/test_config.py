from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from sn_fast.experiments import load_data
from sn_fast.experiments.data import data_set_names, registry
from sn_fast.experiments.training import TrainConfig, UserError, train

from ..data.written import idx


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
        ({"data": "cifar"}, "data='cifar': choose digits, mnist5k, cifar10, cifar100, fashion, images, mnist or svhn"),
        ({"scheme": "pgx"}, "scheme='pgx': choose erm, fgm, pgm or wrm"),
        ({"norm": "3"}, "norm='3': choose 2, inf or 1"),
        ({"attack_labels": "false"}, "attack_labels='false': choose true or predicted"),
        ({"arch": "mlp1"}, "arch='mlp1': choose mlp"),
        ({"arch": "zzz"}, "arch='zzz': choose demo, "),
        ({"arch": "alexnet"}, "arch='alexnet': it caps no layer; choose a name with _sn, or single and beta inf"),
        ({"arch": "mlp2_elu", "single": True}, "arch='mlp2_elu': it caps no layer"),
        ({"arch": "alexnet_dropout", "normalization": "projection"}, "arch='alexnet_dropout': it caps no layer"),
        ({"optimizer": "rms"}, "optimizer='rms': choose sgd or adam"),
        ({"random_labels": 1.5}, "random_labels=1.5: must be a number from 0 to 1"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0: must be a finite number >= 0"),
        ({"eps": 0.0}, "eps=0.0: must be a finite number > 0"),
        ({"eps": -1.0}, "eps=-1.0: must be a finite number > 0"),
        ({"eps": math.nan}, "eps=nan: must be a finite number > 0"),
        ({"lr": math.inf}, "lr=inf: must be a finite number > 0"),
        ({"beta": 0.0}, "beta=0.0: must be a number > 0"),
        ({"beta": math.nan}, "beta=nan: must be a number > 0"),
        ({"beta": math.inf}, "beta=inf: the comparison is with inf; give a finite number"),
        ({"epochs": 0}, "epochs=0: must be an integer >= 1"),
        ({"steps": 0}, "steps=0: must be an integer >= 1"),
        ({"batch_size": -5}, "batch_size=-5: must be an integer >= 1"),
        ({"train_size": 0}, "train_size=0: must be an integer >= 1"),
        ({"threads": 0}, "threads=0: must be an integer from 1 to"),
        ({"seed": -1}, "seed=-1: must be an integer from 0 to"),
        ({"epochs": 1.5}, "epochs=1.5: must be an integer"),
        ({"epochs": True}, "epochs=True: must be an integer"),
        ({"batch_size": "50"}, "batch_size='50': must be an integer"),
        ({"beta": "2"}, "beta='2': must be a number"),
        ({"lr": True}, "lr=True: must be a number"),
        ({"drop_last": "no"}, "drop_last='no': must be True or False"),
        ({"arch": 5}, "arch=5: must be a text"),
        ({"data_dir": 5}, "data_dir=5: must be a text"),
        ({"classes": "35"}, "classes='35': must be integers"),
        ({"classes": (0.5, 1)}, "classes=(0.5, 1): must be integers"),
        ({"classes": 3}, "classes=3: must be integers"),
        ({"split": "half"}, "split='half': choose published, all or held_out"),
        ({"device": "tpu"}, "device='tpu': choose auto, cpu or cuda"),
    ],
)
def test_bad_options_are_refused_by_name_value_and_remedy(options, expected):
    with pytest.raises(UserError) as caught:
        TrainConfig.create(**options)
    assert str(caught.value).startswith(expected)


def test_cuda_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"device='cuda': .* choose cpu"):
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
    with pytest.raises(UserError, match="epochs=6: the run to resume has 5"):
        config.refuse_changes({"epochs": 6})


@pytest.mark.parametrize(("name", "norm"), [("linf", "inf"), ("L2", "2"), ("l1", "1"), ("Linf", "inf")])
def test_norms_and_schemes_have_other_names(name, norm):
    assert TrainConfig.create(norm=name, scheme="pgd") == TrainConfig.create(norm=norm, scheme="pgm")


def test_the_defaults_of_the_papers_data_sets_are_the_published_ones():
    mnist = TrainConfig.create(data="mnist", scheme="wrm").with_strength(9.2157)
    assert (mnist.optimizer, mnist.lr, mnist.batch_size, mnist.drop_last) == ("adam", 1e-3, 128, True)
    assert mnist.eps == pytest.approx(1.3563756, rel=1e-4)  # as a published notebook printed it
    assert mnist.adversary("pgm").eps == pytest.approx(0.46079, rel=1e-4)
    alexnet = TrainConfig.create(data="cifar10", arch="alexnet_sn")
    assert (alexnet.optimizer, alexnet.lr, alexnet.lr_decay) == ("sgd", 0.01, "epoch")
    assert TrainConfig.create(data="cifar10", arch="mlp2_elu_sn").optimizer == "adam"
    assert TrainConfig.create(data="cifar10", arch="mlp2_elu_sn", optimizer="sgd").optimizer == "sgd"


def test_the_learning_rate_decays_by_epochs_as_published_or_by_steps():
    config = TrainConfig.create(lr=0.1, lr_decay="epoch")
    assert config.learning_rate(200, 78000) == pytest.approx(0.1 * 0.974, rel=1e-3)
    assert TrainConfig.create(lr=0.1, lr_decay="step").learning_rate(2, 780) == pytest.approx(0.1 * 0.95**2)
    assert TrainConfig.create(lr=0.1).learning_rate(200, 78000) == 0.1


def test_training_stops_at_the_mean_accuracy_of_five_epochs():
    config = TrainConfig.create(stop_accuracy=0.999)
    assert not config.stops_after([1.0] * 4)
    assert config.stops_after([0.5, 1.0, 1.0, 0.998, 0.999, 0.998])
    assert not config.stops_after([1.0] * 9 + [0.99])
    assert not TrainConfig.create().stops_after([1.0] * 9)


def test_a_key_names_what_is_computed_and_not_where():
    config = TrainConfig.create(data="mnist", beta=2.0, single=True)
    same = TrainConfig.create(data="mnist", beta=2.0, single=True, data_dir="/elsewhere", threads=2, tensorboard=True)
    assert config.key() == same.key()
    others = [
        TrainConfig.create(**{"data": "mnist", "beta": 2.0, "single": True, **change})
        for change in ({"seed": 1}, {"eps": 0.1}, {"epochs": 3}, {"beta": 4.0}, {"random_labels": 0.5})
    ]
    assert len({config.key(), *(other.key() for other in others)}) == 6


def test_fashion_has_the_defaults_of_mnist(tmp_path):
    """A run on drawn files in its format; the first 5,000 training images are held back, as MNIST's."""
    fashion, mnist = (TrainConfig.create(data=data).to_json() for data in ("fashion", "mnist"))
    assert {**fashion, "data": "mnist"} == mnist
    rng = np.random.default_rng(0)
    for part, count in (("t10k", 540), ("train", 5_300)):
        images, labels = rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    options = {"data": "fashion", "data_dir": str(tmp_path), "scheme": "fgm", "device": "cpu", "epochs": 1}
    with pytest.raises(UserError, match="allow_partial"):
        train(TrainConfig.create(**options), tmp_path / "run")
    result = train(TrainConfig.create(**options, allow_partial=True), tmp_path / "run")
    assert result.metrics["status"] == "finished"
    norms = np.linalg.norm(images[5_000:].reshape(300, -1) / 255, axis=1)
    assert result.config.eps == pytest.approx(0.05 * norms.mean(), rel=1e-5)


def test_a_number_is_one_option_whatever_kind_of_number_it_is(tmp_path):
    kinds = {"beta": 2, "lr": np.float32(0.5), "epochs": np.int64(3), "seed": np.uint8(7), "classes": [np.int32(1), 3]}
    config = TrainConfig.create(**kinds, data_dir=tmp_path)
    plain = TrainConfig.create(beta=2.0, lr=0.5, epochs=3, seed=7, classes=(1, 3), data_dir=str(tmp_path))
    assert config == plain
    assert config.key() == plain.key()
    assert json.dumps(config.to_json()) == json.dumps(plain.to_json())
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_an_optimizer_that_is_chosen_has_its_own_published_step_size():
    def sizes(**options):
        config = TrainConfig.create(**options)
        return config.lr, config.lr_decay

    assert sizes(data="cifar10", optimizer="adam") == sizes(data="mnist") == (1e-3, "none")
    assert sizes(data="mnist", optimizer="sgd") == sizes(data="cifar10", optimizer="sgd") == (0.01, "epoch")
    assert sizes(data="cifar10", arch="mlp1_elu_sn", optimizer="sgd") == (0.01, "epoch")
    assert sizes(optimizer="sgd") == (0.05, "none")
    assert sizes(optimizer="adam", lr=0.2) == (0.2, "none")


def test_the_samples_of_a_run_are_those_that_its_options_name():
    config = TrainConfig.create(train_size=200, test_size=90, validation_size=50, classes=(7, 3), seed=5)
    split = load_data(config.data, **config.data_options())
    assert (len(split.validation) < 50, len(split.test), split.num_classes) == (True, 90, 2)
    everything = load_data("digits", train_size=200, seed=5).train
    kept = torch.stack([x for x, y in zip(everything.x, everything.y) if y in (7, 3)])
    assert torch.equal(split.train.x, kept)
    assert split.train.y.tolist() == [{7: 0, 3: 1}[y] for y in everything.y.tolist() if y in (7, 3)]
    assert config.key() != TrainConfig.create(train_size=200, test_size=90, validation_size=50, seed=5).key()


def test_a_new_data_set_needs_nothing_but_its_reader(monkeypatch, tmp_path):
    data_set_names()
    monkeypatch.setattr(registry, "_SETS", dict(registry._SETS))
    rng = np.random.default_rng(0)

    def images(count):
        return registry.Images(rng.integers(0, 256, (count, 3, 6, 6), np.uint8), np.arange(count) % 4)

    registry.register(registry.DataSet("own", lambda request: (images(40), images(30)), num_classes=4, validation=9))
    options = {"data": "own", "data_dir": tmp_path, "epochs": 1, "batch_size": 20, "single": True, "device": "cpu"}
    result = train(TrainConfig.create(**options), tmp_path / "run")
    assert result.config.arch == "mlp1_relu_sn"
    assert set(result.metrics["networks"]["beta=4"]["final"]["accuracy"]) == {"train", "validation", "test", "gap"}


def test_sets_that_are_like_each_other_alone_are_named(monkeypatch):
    data_set_names()
    monkeypatch.setattr(registry, "_SETS", dict(registry._SETS))
    for name, like in (("one", "two"), ("two", "three"), ("three", "two"), ("itself", "itself"), ("grey", "fashion")):
        registry.register(registry.DataSet(name, lambda request: ([], []), like=like))
    for name in ("one", "three", "itself"):
        with pytest.raises(UserError, match=rf"data set '{name}': DataSet\(like='\w+'\) leads to no defaults"):
            TrainConfig.create(data=name)
    assert TrainConfig.create(data="grey").arch == "mlp1_relu_sn"


def test_two_folders_of_own_images_are_two_runs(tmp_path, monkeypatch):
    """Those of an official set have the same images."""
    a, b = tmp_path / "a", tmp_path / "b"
    own, other = (TrainConfig.create(data="images", data_dir=str(folder)) for folder in (a, b))
    assert own.key() != other.key()
    assert own.key() == TrainConfig.create(data="images", data_dir=str(a / ".." / "a")).key()
    monkeypatch.chdir(tmp_path)
    assert own.key() == TrainConfig.create(data="images", data_dir="a").key()
    for data in ("digits", "mnist", "fashion", "cifar10", "cifar100", "svhn"):
        assert len({TrainConfig.create(data=data, data_dir=str(folder)).key() for folder in (a, b)}) == 1
