"""A run shared by several processes gives what one process gives."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sn_fast.experiments.data import samples
from sn_fast.experiments.training import TrainConfig, UserError, resume, train
from sn_fast.experiments.training.ranks import Ranks, ranks_of_torchrun, store_of_attempt

from ...process_groups import run_in_group
from .conftest import FEW, TINY

# Batches of 25 and a last one of 1: two processes have different parts of it, and one of them has none of the last.
OPTIONS: dict[str, Any] = {
    **TINY,
    "epochs": 2,
    "train_size": 51,
    "evaluation": "published",
    "single": True,
    "beta": 1.2,
    "lr": 0.02,
}


RUNS = {
    "pgm": {"scheme": "pgm"},
    "erm": {"scheme": "erm", "arch": "small_elu_sn", "optimizer": "adam"},
    "resumed": {"scheme": "fgm", "epochs": 3},
}


def _with_batch_norm(ranks: Ranks) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of four steps, and then weights and statistics. Of the third batch all processes but one have no part."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.01), nn.ReLU(), nn.Conv2d(4, 3, 3)
    model = nn.Sequential(*layers, nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 36, 5))
    wrapped = ranks.wrapped(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for size in (7, 8, 1, 5):
        x, y = ranks.part(torch.randn(size, 1, 8, 8)), ranks.part(torch.randint(5, (size,)))
        loss = ranks.size * F.cross_entropy(wrapped(x), y, reduction="sum") / size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses += ranks.summed([loss.item() / ranks.size], x.device)
    return losses, model.state_dict()


def _share(rank: int, folder: str) -> None:
    """Everything that two processes do, for starting them takes longer than what they do."""
    torch.save(_with_batch_norm(Ranks(rank, 2)), Path(folder, f"batch_norm_{rank}.pt"))
    load = samples.load
    samples.load = lambda name: tuple(part[:FEW] for part in load(name))  # type: ignore[assignment]
    ranks = partial(Ranks, rank, 2)
    for name in ("pgm", "erm"):
        result = train(TrainConfig.create(**{**OPTIONS, **RUNS[name]}), Path(folder, "two", name), ranks=ranks())
        assert result.metrics["status"] == "finished"
    resume(Path(folder, "two", "resumed"), ranks=ranks())
    with pytest.raises(UserError, match="is not empty" if rank == 0 else "the first process has ended"):
        train(TrainConfig.create(**OPTIONS), Path(folder, "two", "pgm"), ranks=ranks())


def test_two_processes_have_the_losses_of_one(few_digits: None, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sn_fast.experiments.training.job._Run._keep", _stopped_after_an_epoch)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig.create(**{**OPTIONS, **RUNS["resumed"]}), tmp_path / "two" / "resumed")
    run_in_group(_share, str(tmp_path), folder=tmp_path)
    for rank in (0, 1):
        torch.testing.assert_close(
            torch.load(tmp_path / f"batch_norm_{rank}.pt"), _with_batch_norm(Ranks()), rtol=1e-5, atol=1e-6
        )
    for name, options in RUNS.items():
        two, one = tmp_path / "two" / name, tmp_path / "one" / name
        train(TrainConfig.create(**{**OPTIONS, **options}), one)
        torch.testing.assert_close(losses(two), losses(one), rtol=2e-5, atol=0)
        ours, theirs = (torch.load(path / "checkpoint.pt", weights_only=True)["networks"] for path in (two, one))
        for key, weight in theirs["beta=1.2"]["model"].items():
            torch.testing.assert_close(ours["beta=1.2"]["model"][key], weight, rtol=1e-3, atol=1e-4)


def losses(folder: Path) -> torch.Tensor:
    networks = json.loads((folder / "metrics.json").read_text())["networks"]
    return torch.tensor([record["loss"] for network in networks.values() for record in network["epochs"]])


def _stopped_after_an_epoch(run: Any, trained: Any) -> None:
    raise KeyboardInterrupt


def test_without_torchrun_the_message_says_how_to_start() -> None:
    with pytest.raises(UserError, match="start the program with torchrun"), ranks_of_torchrun("cpu"):
        pass


@pytest.mark.parametrize(
    ("environment", "is_found"),
    [
        ({"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ({"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": "0"}, True),
        ({"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}, True),  # the other node may count 0
        ({}, True),
    ],
)
def test_a_restart_does_not_find_the_addresses_of_the_dead(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], is_found: bool
) -> None:
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "RANK": "1", "WORLD_SIZE": "2"}
    for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if environment:
        monkeypatch.setenv("GROUP_WORLD_SIZE", environment["GROUP_WORLD_SIZE"])
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    store, rank, size = store_of_attempt()
    assert (rank, size) == (1, 2)
    store.set("address", "of a process")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert store_of_attempt()[0].check(["address"]) == is_found


@pytest.mark.slow
def test_the_command_under_torchrun(tmp_path: Path) -> None:
    options = ["--train-size", "51", "--epochs", "1", "--batch-size", "25", "--steps", "1", "--single"]
    options += ["--evaluation", "published", "--quiet", "--out", str(tmp_path / "run")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "sn_fast"]
    command = [*torchrun, "train", "--ddp", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metrics, checkpoint and plots") == 1
