"""``sn-fast bench``: what normalising a model costs on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sn_fast.cli import main
from sn_fast.errors import UserError
from sn_fast.inspection.cost import Cost, cost_table, measure_cost

NETS = """
from torch import nn
def small():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
class Pair(nn.Module):
    def forward(self, x):
        return x, x
def pair():
    return nn.Sequential(nn.Linear(6, 6), Pair())
"""
SMALL = ["bench", "nets:small", "--input-size", "1x4x4", "--threads", "1", "--turns", "3", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def _nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "nets", raising=False)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--attack-steps", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "nets:small, input 1x4x4, batch 2, PGD-2, 1 CPU thread"
    assert [line.split("  ")[0] for line in lines[3:]] == [
        "no SN",
        "apply_spectral_norm",
        "SpectralProjection",
        "torch's spectral_norm",
    ]
    assert "  1.00  " in lines[3]
    assert lines[4].endswith("true norm")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["input_size"], found["batch_size"]) == ("nets:small", [1, 4, 4], 2)
    ways = found["ways"]
    assert ways[0]["refresh"] is None
    assert all(way["problem"] == "" for way in ways)
    for way in ways:
        assert way["step"]["turns"] == 3
        assert 0 < way["step"]["wall_ms"]["min"] <= way["step"]["wall_ms"]["median"]
        assert (way["step"]["ratio"]["median"] == 1) == (way["name"] == "no SN")


def test_the_model_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    costs = measure_cost(model, (1, 4, 4), batch=2, turns=3)
    assert all(cost.step is not None for cost in costs)
    assert not model.training
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_have_the_dtype_of_the_weights(dtype: torch.dtype) -> None:
    costs = measure_cost(nn.Linear(6, 3).to(dtype), (6,), batch=2, turns=3)
    assert all(cost.step is not None for cost in costs)


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Linear(6, 3).requires_grad_(False)], ids=["none", "frozen"])
def test_a_model_that_does_not_train_is_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match="argument `model`: it has no parameter that trains; give one that has"):
        measure_cost(model, (6,), batch=2, turns=3)


def test_a_way_that_cannot_be_had_says_why() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    costs = {cost.name: cost for cost in measure_cost(model, (6,), batch=2, turns=3)}
    assert costs["no SN"].step is not None
    assert costs["SpectralProjection"].step is None
    assert costs["SpectralProjection"].problem
    table = cost_table([*costs.values(), Cost("another", "x", problem="not here")])
    assert table.splitlines()[-1].split() == ["another", "-", "-", "-", "not", "here"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--turns", "2"], "argument --turns: invalid value 2: must be an integer from 3 to"),
        (["--batch-size", "0"], "argument --batch-size: invalid value 0: must be an integer from 1 to"),
        (["--attack-steps", "-1"], "argument --attack-steps: invalid value -1: must be an integer from 0 to"),
        (["--input-size", "3x4x4"], "argument --input-size: a training step on a batch of 2 failed: RuntimeError: "),
        (["--input-size", "big"], "argument --input-size: invalid value big: give numbers such as 3x224x224"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], argv: list[str], expected: str) -> None:
    assert main([*SMALL, *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"sn-fast: error: {expected}")
    assert err.count("\n") == 1


def test_an_output_that_is_no_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "nets:pair", "--input-size", "6", "--threads", "1"]) == 2
    assert "argument MODEL: its output is a tuple; give a model that returns a tensor" in capsys.readouterr().err


def test_a_normalised_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with open("nets.py", "a") as file:
        file.write("import sn_fast, torch\n")
        file.write("def sn():\n    return sn_fast.apply_spectral_norm(small(), torch.zeros(1, 1, 4, 4))\n")
    assert main(["bench", "nets:sn", *SMALL[2:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == "sn-fast: error: argument MODEL: layers of it are normalised already (0, 3); give it as it was before"
    )
