"""sn-fast norms of what sn-fast train leaves: the network comes with the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sn_fast.cli import main
from sn_fast.experiments.data import samples as data
from sn_fast.experiments.training import TrainConfig, train, trained_networks
from sn_fast.layers import operator_of

TINY: dict[str, Any] = {"train_size": 60, "epochs": 1, "batch_size": 30, "steps": 1, "eps": 0.3, "device": "cpu"}
QUIET = ["--quiet", "--threads", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        load = data.load
        patch.setattr(data, "load", lambda name: tuple(part[:240] for part in load(name)))
        return train(TrainConfig.create(**TINY), tmp_path_factory.mktemp("runs") / "mine").path


def measured(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["norms", *argv, *QUIET, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.parametrize("network", ["beta=1.6", "beta=inf"])
def test_intervals_hold_the_norms_of_the_trained_network(run, capsys, network):
    found = measured(capsys, str(run), "--network", network)
    assert found["model"] == f"{run}, {network}"
    assert found["checkpoint"] == str(run / "checkpoint.pt")
    assert found["input_size"] == [1, 8, 8]
    model = trained_networks(run)[network].model
    assert [layer["name"] for layer in found["layers"]] == ["conv1", "conv2", "conv3", "fc"]
    for layer in found["layers"]:
        size = layer["input_size"]
        op = operator_of(model.get_submodule(layer["name"]), None if size is None else tuple(size))
        truth = float(torch.linalg.svdvals(op.to_dense().detach().double())[0])
        assert layer["lower"] <= truth * (1 + 1e-9)
        assert truth <= layer["upper"] * (1 + 1e-9)


def test_ways_to_name_a_run(run, capsys, monkeypatch):
    monkeypatch.chdir(run.parent)
    expected = measured(capsys, str(run))["layers"]
    ways = (["mine"], ["mine/"], ["mine/checkpoint.pt"], ["--checkpoint", "mine/checkpoint.pt"])
    for argv in ways:
        found = measured(capsys, *argv)
        assert found["model"] == "mine, beta=1.6"  # the normalised one
        assert [layer["upper"] for layer in found["layers"]] == [layer["upper"] for layer in expected]
    monkeypatch.chdir(run)
    assert measured(capsys, ".")["model"] == "., beta=1.6"
    assert measured(capsys, "checkpoint.pt")["model"] == "., beta=1.6"


def test_the_table_names_run_and_network(run, capsys):
    assert main(["norms", str(run), *QUIET]) == 0
    assert capsys.readouterr().out.startswith(f"{run}, beta=1.6, input 1x8x8\n\nlayer ")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["RUN", "--network", "beta=2"], "argument --network: RUN has no beta=2; choose beta=inf or beta=1.6"),
        (["RUN", "--checkpoint", "a.pt"], "argument --checkpoint: RUN is a run with weights of its own"),
        (["RUN", "--pretrained"], "argument --pretrained: RUN is a run with weights of its own"),
        (["RUN/.."], "argument MODEL: the folder RUN/.. holds no run of sn-fast train"),
        (["torch.nn:Identity", "--network", "beta=2"], "argument --network: needs the folder of a run"),
        (["--checkpoint", "RUN/metrics.json"], "the following arguments are required: MODEL"),
        (["DAMAGED"], "argument MODEL: DAMAGED/checkpoint.pt is damaged"),
    ],
)
def test_bad_input(run, capsys, tmp_path, argv, expected):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_bytes((run / "config.json").read_bytes())
    (damaged / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut short")

    def placed(text: str) -> str:
        return text.replace("RUN", str(run)).replace("DAMAGED", str(damaged))

    assert main(["norms", *map(placed, argv), *QUIET]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert placed(expected) in err
