from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sn_fast.errors import OptionError
from sn_fast.experiments.training import Interrupted, TrainConfig, UserError, job, resume, table, train
from sn_fast.experiments.training.loop import Trainee

from .conftest import TINY, without_times

FILES = {
    "config.json",
    "metrics.json",
    "checkpoint.pt",
    "robustness.png",
    "learning.png",
    "margins.png",
    "sigma.png",
}


def weights(path: Path) -> dict[str, torch.Tensor]:
    networks = torch.load(path / "checkpoint.pt", weights_only=True)["networks"]
    return {f"{name} {key}": t for name, network in networks.items() for key, t in network["model"].items()}


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    first, second = (without_times(json.loads((path / "metrics.json").read_text())) for path in (one, other))
    assert first == second


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


@pytest.mark.parametrize("scheme", ["erm", "fgm", "pgm", "wrm"])
def test_a_run_leaves_everything_it_promises(tiny_run, scheme):
    result = tiny_run(scheme=scheme, device="auto")
    assert {p.name for p in result.path.iterdir()} == FILES
    metrics = json.loads((result.path / "metrics.json").read_text())
    assert metrics == result.metrics
    assert metrics["status"] == "finished"
    assert TrainConfig.from_json(json.loads((result.path / "config.json").read_text())) == result.config
    assert list(metrics["networks"]) == ["beta=inf", f"beta={result.config.beta:g}"]
    for network in metrics["networks"].values():
        assert [record["epoch"] for record in network["epochs"]] == [1, 2, 3]
        assert network["epochs"][-1]["sigma"].keys() == {"conv1", "conv2", "conv3", "fc"}
        assert network["final"]["accuracy"].keys() == {"train", "test", "gap"}
        assert network["final"]["seconds_per_epoch"] > 0
    for name in FILES:
        if name.endswith(".png"):
            width, height = png_size(result.path / name)
            assert width > 900
            assert height > 500


def test_the_last_epoch_has_its_norms_where_others_have_none(tiny_run, monkeypatch):
    every_epoch = tiny_run("every").metrics["networks"]
    monkeypatch.setattr(job, "_NORM_POINTS", 2)
    sparse = tiny_run("sparse")
    for network in sparse.metrics["networks"].values():
        assert ["sigma" in record for record in network["epochs"]] == [True, True, True]
    monkeypatch.setattr(job, "_NORM_POINTS", 1)
    sparser = tiny_run("sparser", epochs=7, stop_accuracy=0.05)  # stops after five
    for name, network in every_epoch.items():
        assert network["final"]["sigma"] == sparse.metrics["networks"][name]["final"]["sigma"]
        measured = [record["epoch"] for record in sparser.metrics["networks"][name]["epochs"] if "sigma" in record]
        assert measured == [1, len(sparser.metrics["networks"][name]["epochs"])]
    again = resume(sparser.path)
    assert without_times(again.metrics) == without_times(sparser.metrics)


@pytest.mark.parametrize("options", [{"norm": "inf"}, {"norm": "1"}, {"beta": float("inf"), "single": True}])
def test_other_norms_and_a_single_network(tiny_run, options):
    result = tiny_run(epochs=1, **options)
    assert len(result.metrics["networks"]) == len(result.config.betas)
    assert "sigma" in table(result.config, result.metrics)


def test_networks_see_equal_batches_from_equal_weights(tiny_run):
    """A cap that no layer reaches changes nothing, so the two networks must agree."""
    networks = list(tiny_run(beta=1e6).metrics["networks"].values())
    losses = [[record["loss"] for record in network["epochs"]] for network in networks]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_equal_options_give_equal_runs_and_another_seed_another(tiny_run):
    first, second, other = tiny_run("a"), tiny_run("b"), tiny_run("c", seed=8)
    assert_same_run(first.path, second.path)
    assert without_times(first.metrics) != without_times(other.metrics)


@pytest.mark.parametrize("at", [(1, "beta=inf"), (2, "beta=inf"), (2, "beta=1.2"), (3, "beta=1.2")])
def test_a_run_interrupted_in_an_epoch_continues_bit_by_bit(tiny_run, monkeypatch, tmp_path, at):
    whole = tiny_run("whole", beta=1.2)
    train_epoch = Trainee.train_epoch

    def interrupted(self, samples, epoch, bar):
        if (epoch, self.name) == at:
            train_epoch(self, samples, epoch, bar)  # the weights have moved on when it happens
            raise KeyboardInterrupt
        return train_epoch(self, samples, epoch, bar)

    with monkeypatch.context() as patch:
        patch.setattr(Trainee, "train_epoch", interrupted)
        with pytest.raises(Interrupted, match=r"interrupted; continue with resume\('.*stopped'\)"):
            tiny_run("stopped", beta=1.2)
    stopped = tmp_path / "stopped"
    assert json.loads((stopped / "metrics.json").read_text())["epochs_done"] == at[0] - 1
    resume(stopped)
    assert_same_run(whole.path, stopped)


def test_a_run_interrupted_in_the_evaluation_continues(tiny_run, monkeypatch, tmp_path):
    whole = tiny_run("whole")
    with monkeypatch.context() as patch:
        patch.setattr("sn_fast.experiments.training.job.evaluate", lambda *args: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            tiny_run("stopped")
    resume(tmp_path / "stopped")
    assert_same_run(whole.path, tmp_path / "stopped")
    assert {p.name for p in (tmp_path / "stopped").iterdir()} == FILES


def test_a_finished_run_can_be_resumed_and_stays_what_it_is(tiny_run):
    result = tiny_run()
    assert without_times(resume(result.path).metrics) == without_times(result.metrics)


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is POSIX")
def test_a_killed_run_continues_bit_by_bit(tiny_run, tmp_path):
    options = {**TINY, "epochs": 12}
    killed = tmp_path / "killed"
    script = (
        "from sn_fast.experiments.data import samples as data\n"
        "from sn_fast.experiments.training import TrainConfig, train\n"
        "load = data.load\n"
        "data.load = lambda name: tuple(part[:240] for part in load(name))\n"
        f"train(TrainConfig.create(**{options}), {str(killed)!r})\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        metrics = killed / "metrics.json"
        if metrics.exists() and json.loads(metrics.read_text())["epochs_done"] >= 2:
            break
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    resume(killed)
    assert_same_run(tiny_run("whole", **options).path, killed)


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_last_good_epoch(tiny_run, monkeypatch, tmp_path):
    train_epoch = Trainee.train_epoch

    def broken(self, samples, epoch, bar):
        if epoch == 3:
            with torch.no_grad():
                self.model.fc.bias.fill_(torch.nan)
        return train_epoch(self, samples, epoch, bar)

    monkeypatch.setattr(Trainee, "train_epoch", broken)
    with pytest.raises(UserError, match=r"the loss became nan in epoch 3 with beta=inf; .*`lr` 0\.01.*holds epoch 2"):
        tiny_run()
    monkeypatch.undo()
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 2
    assert all(t.isfinite().all() for t in weights(tmp_path / "run").values())


def test_resume_refuses_what_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"argument `path`: there is no folder .*absent"):
        resume(tmp_path / "absent")
    with pytest.raises(UserError, match=r"argument `path`: .* has no checkpoint\.pt"):
        resume(tmp_path)


def test_resume_refuses_a_checkpoint_of_another_network(tiny_run, monkeypatch):
    path = tiny_run(epochs=1).path
    monkeypatch.setattr("sn_fast.experiments.networks.demo.WIDTH", 8)
    with pytest.raises(UserError, match=r"the checkpoint in .*run is not of these networks \(Error.*start a new run"):
        resume(path)


def test_resume_refuses_another_configuration(tiny_run):
    path = tiny_run(epochs=1).path
    with pytest.raises(UserError, match=r"beta=3\.0: the run to resume has"):
        resume(path, {"beta": 3.0})
    config = path / "config.json"
    good = config.read_text()
    config.write_text(good.replace('"epochs": 1', '"epochs": 9'))
    with pytest.raises(UserError, match=r"config\.json is not the configuration that checkpoint\.pt was trained with"):
        resume(path)
    config.write_text(good[:30])
    with pytest.raises(UserError, match=r"config\.json is missing or damaged"):
        resume(path)
    config.write_text(good)
    resume(path)


def test_a_missing_package_is_noticed_before_anything_is_written(uninstalled, few_digits, tmp_path):
    uninstalled("matplotlib")
    with pytest.raises(UserError, match=r"pip install 'sn_fast\[train\]'"):
        train(TrainConfig.create(**TINY), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_has_its_own_number_of_threads_and_the_caller_gets_his_back(tiny_run, monkeypatch):
    before, during = torch.get_num_threads(), []
    train_epoch = Trainee.train_epoch

    def watched(self, *args):
        during.append(torch.get_num_threads())
        return train_epoch(self, *args)

    monkeypatch.setattr(Trainee, "train_epoch", watched)
    torch.set_num_threads(2)
    try:
        tiny_run(epochs=1)
        assert (during, torch.get_num_threads()) == ([1, 1], 2)
    finally:
        torch.set_num_threads(before)


def test_the_title_of_the_table_says_what_the_images_were(tiny_run):
    result = tiny_run(classes=(3, 5, 8), random_labels=0.25, epochs=1, single=True, evaluation="published")
    images = result.metrics["images"]["train"]
    assert images < 60  # of the embedded sets the classes are chosen among the images drawn
    title = table(result.config, result.metrics).splitlines()[0]
    assert title.startswith(f"digits: {images} training images of the classes 3, 5, 8, 25% of their labels random, 1 ")
    del result.metrics["images"]
    assert table(result.config, result.metrics).startswith("digits: 60 training images of")


def test_the_table_shows_what_the_metrics_hold(tiny_run):
    result = tiny_run(beta=1.25)
    text = table(result.config, result.metrics)
    lines = {line.split("  ")[1].strip(): line for line in text.splitlines() if line.startswith("  ")}
    accuracy = [network["final"]["accuracy"] for network in result.metrics["networks"].values()]
    expected = [f"{100 * a[part]['pgm']:.1f}" for a in accuracy for part in ("train", "test", "gap")]
    assert lines["PGM ℓ2 ε = 0.3 *"].split()[-6:] == expected
    sigma = [network["final"]["sigma"]["conv2"] for network in result.metrics["networks"].values()]
    assert lines["conv2"].split() == ["conv2", f"{sigma[0]:.3f}", "inf", f"{sigma[1]:.3f}", "1.25"]


def test_a_run_that_an_earlier_version_began_goes_on_and_can_be_read(tiny_run, monkeypatch, tmp_path):
    """Its config.json lacks the options that came later; its checkpoint, once it has been resumed, has them."""
    whole = tiny_run("whole")
    with monkeypatch.context() as patch:
        patch.setattr("sn_fast.experiments.training.job.evaluate", lambda *args: signal.raise_signal(signal.SIGINT))
        with pytest.raises(Interrupted):
            tiny_run("stopped")
    file = tmp_path / "stopped" / "config.json"
    values = json.loads(file.read_text())
    for name in ("reference", "validation_size", "keep_every"):
        del values[name]
    file.write_text(json.dumps(values))
    resume(tmp_path / "stopped")
    assert_same_run(whole.path, resume(tmp_path / "stopped").path)
    values["lr"] *= 2
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="is not the configuration that"):
        resume(tmp_path / "stopped")


@pytest.mark.parametrize(("images", "size"), [(60, 61), (37, 1000)])
def test_a_run_whose_epochs_have_no_step_is_refused_before_it_begins(tmp_path, images: int, size: int) -> None:
    config = TrainConfig.create(train_size=images, batch_size=size, drop_last=True, epochs=1)
    with pytest.raises(OptionError, match=rf"batch_size={size}: the {images} training images are fewer"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
