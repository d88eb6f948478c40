"""Options of a run that its files show."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from sn_fast.errors import UserError
from sn_fast.experiments.training import TrainConfig, resume, train, trained_networks
from sn_fast.experiments.training.loop import Trainee

from .conftest import TINY

ONE = {"single": True, "evaluation": "published", "scheme": "fgm"}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_epoch_once_also_after_a_resume(tiny_run, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorboard")
    with monkeypatch.context() as patch:
        patch.setattr("sn_fast.experiments.training.job._Run._save", _fails_in(2))
        with pytest.raises(KeyboardInterrupt):
            tiny_run("run", tensorboard=True, **ONE)
    result = resume(tmp_path / "run")
    (network,) = result.metrics["networks"].values()
    found = scalars(result.path / "tensorboard" / "beta=1.6")
    assert {"loss", "accuracy/train", "accuracy/test", "sigma/conv1", "sigma/fc"} <= set(found)
    assert [step for step, _ in found["loss"]] == [1, 2, 3]
    assert [v for _, v in found["loss"]] == pytest.approx([e["loss"] for e in network["epochs"]], rel=1e-6)


def _fails_in(epoch: int):
    from sn_fast.experiments.training.job import _Run

    save = _Run._save

    def saved(run) -> None:
        if run.epoch == epoch:  # the epoch is written to TensorBoard, and done again
            raise KeyboardInterrupt
        save(run)

    return saved


def test_without_the_package_the_run_does_not_begin(tiny_run, tmp_path, uninstalled) -> None:
    uninstalled("tensorboard")
    with pytest.raises(UserError, match="the package tensorboard is not installed; run: pip install tensorboard"):
        tiny_run("run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_weights_of_every_second_epoch_are_kept(tiny_run) -> None:
    result = tiny_run(keep_every=2, epochs=5, **ONE)
    kept = sorted(path.name for path in result.path.glob("weights-*"))
    assert kept == ["weights-beta=1.6-epoch2.pt", "weights-beta=1.6-epoch4.pt"]
    (network,) = trained_networks(result.path).values()
    network.model.load_state_dict(torch.load(result.path / kept[-1], weights_only=True))


def test_training_stops_early_and_each_network_for_itself(tiny_run, monkeypatch) -> None:
    monkeypatch.setattr(TrainConfig, "stops_after", lambda self, a: len(a) == (2 if self.stop_accuracy < 0.5 else 3))
    result = tiny_run(stop_accuracy=0.4, epochs=4)
    assert [len(n["epochs"]) for n in result.metrics["networks"].values()] == [2, 2]
    assert result.metrics["status"] == "finished"


def test_one_network_stops_and_the_other_goes_on(tiny_run, monkeypatch) -> None:
    monkeypatch.setattr(Trainee, "stopped", property(lambda self: math.isinf(self.beta) and len(self.epochs) >= 1))
    networks = tiny_run(epochs=3).metrics["networks"]
    assert {name: len(network["epochs"]) for name, network in networks.items()} == {"beta=inf": 1, "beta=1.6": 3}


def test_random_labels_are_of_the_training_images_alone(tiny_run) -> None:
    result = tiny_run("random", random_labels=1.0, epochs=30, scheme="erm", train_size=30, single=True)
    accuracy = result.metrics["networks"]["beta=1.6"]["final"]["accuracy"]
    assert accuracy["test"]["clean"] < 0.3  # nothing to learn about them


@pytest.mark.parametrize("scheme", ["erm", "pgm", "wrm"])
def test_bfloat16_trains_nearly_as_float32(tiny_run, scheme) -> None:
    runs = [tiny_run(p, precision=p, **{**ONE, "scheme": scheme}) for p in ("float32", "bfloat16")]
    losses = [[e["loss"] for e in next(iter(r.metrics["networks"].values()))["epochs"]] for r in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
    assert losses[0] != losses[1]
    weights = torch.load(runs[1].path / "checkpoint.pt", weights_only=True)["networks"]["beta=1.6"]["model"]
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["erm", "pgm"])
def test_a_compiled_run_has_the_losses_of_an_eager_one(tiny_run, scheme) -> None:
    runs = [tiny_run(str(c), compile=c, **{**ONE, "scheme": scheme}) for c in (False, True)]
    losses = [[e["loss"] for e in next(iter(r.metrics["networks"].values()))["epochs"]] for r in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_diverged_run_says_so_in_its_files(tiny_run, tmp_path) -> None:
    with pytest.raises(UserError, match="is too large"):
        train(TrainConfig.create(**{**TINY, "lr": 1e30}), tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["status"] == "diverged"
    assert "in epoch" in metrics["reason"]
