from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sn_fast.cli import main
from sn_fast.errors import OptionError, UserError
from sn_fast.experiments.data import Samples
from sn_fast.experiments.reports.attack import attack_network
from sn_fast.experiments.training import TrainConfig, train
from sn_fast.experiments.training.adversary import Adversary

from ..reproduction.conftest import few_digits

__all__ = ["few_digits"]  # a fixture


def linear(weight: torch.Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return nn.Sequential(nn.Flatten(), layer)


def samples(n: int = 60, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, 2, 3, dtype=torch.float64, generator=generator)
    return Samples(x, (x.flatten(1)[:, 0] > 0.1).long())


class TwoResults(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.flatten(1), x


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("x")


def test_examples_of_strengths_that_six_digits_do_not_tell_apart_are_all_kept() -> None:
    strengths = [0.123456, 0.12345612, 0.12345634]
    model = linear(torch.randn(2, 6, dtype=torch.float64))
    attacks = [Adversary("fgm", "2", eps, 1) for eps in strengths]
    examples = attack_network(model, samples(), attacks, keep_examples=True).examples
    assert list(examples) == ["x", "y", "fgm_2_0.123456", "fgm_2_0.12345612", "fgm_2_0.12345634"]
    for eps, name in zip(strengths, list(examples)[2:]):
        moved = np.linalg.norm((examples[name] - examples["x"]).reshape(60, -1), axis=1)
        np.testing.assert_allclose(moved, eps, rtol=1e-12)


@pytest.mark.parametrize(("norm", "dual"), [("2", 2.0), ("inf", 1.0)])
@pytest.mark.parametrize("scheme", ["fgm", "pgm"])
def test_a_linear_network_loses_what_it_must_and_no_more(norm: str, dual: float, scheme: str) -> None:
    """Of two classes, an image survives if its margin exceeds eps times the dual norm of the rows' difference."""
    weight = torch.tensor([[0.3, -0.2, 0.1, 0.0, 0.5, -0.1], [1.2, 0.4, -0.3, 0.2, 0.1, 0.3]], dtype=torch.float64)
    data = samples()
    logits = linear(weight)(data.x)
    lead = (logits[:, 1] - logits[:, 0]) * (2 * data.y - 1)
    strengths = [Adversary(scheme, norm, eps, 15) for eps in (0.1, 0.3, 0.7)]  # type: ignore[arg-type]
    report = attack_network(linear(weight), data, strengths)
    difference = float((weight[1] - weight[0]).norm(p=dual))
    for strength in report.strengths:
        expected = float((lead > strength.adversary.eps * difference).double().mean())
        assert strength.accuracy == pytest.approx(expected, abs=1e-12)
        assert strength.certified is not None
        assert strength.certified <= strength.accuracy
    assert report.clean == float((lead > 0).double().mean())
    assert report.lipschitz == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-3)


def test_what_is_certified_is_the_margin_over_the_lipschitz_constant() -> None:
    """||f(x) - f(x')|| <= L eps changes the difference of two logits by at most sqrt(2) L eps."""
    weight = torch.eye(3, 6, dtype=torch.float64)
    data = samples(200)
    report = attack_network(linear(weight), data, [Adversary("fgm", "2", eps, 1) for eps in (0.1, 0.5)])
    logits = linear(weight)(data.x)
    true = logits.gather(1, data.y[:, None])[:, 0]
    lead = true - logits.scatter(1, data.y[:, None], -torch.inf).amax(dim=1)
    for strength in report.strengths:
        expected = float((lead > 2**0.5 * strength.adversary.eps).double().mean())
        assert strength.certified == pytest.approx(expected, abs=1e-2)


def test_nothing_is_certified_of_wrm_nor_of_a_network_without_a_bound() -> None:
    report = attack_network(linear(torch.eye(2, 6, dtype=torch.float64)), samples(), [Adversary("wrm", "2", 0.1, 3)])
    assert report.strengths[0].certified is None
    assert report.rows()[1][:3] == ("wrm", "", 0.1)  # no ball, no norm

    class Square(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :2] ** 2

    report = attack_network(Square(), samples(), [Adversary("fgm", "2", 0.1, 1)])
    assert report.strengths[0].certified is None
    assert "nothing is certified: " in report.text()


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (nn.Linear(5, 2), samples(), "the model does not take these images, of 1x2x3"),
        (linear(torch.zeros(1, 6, dtype=torch.float64)), samples(), r"output has shape \(60, 1\)"),
        (linear(torch.full((2, 6), torch.nan, dtype=torch.float64)), samples(), "infinite or nan"),
        (linear(torch.eye(2, 6, dtype=torch.float64)), Samples(samples().x, samples().y + 1), "the class 2, and the"),
        (TwoResults(), samples(), r"the model's output is a tuple; attacks need logits \(B, classes\)"),
        (Raises(), samples(), r"the model does not take these images, of 1x2x3 \(KeyError: 'x'\)"),
        (linear(torch.eye(2, 6, dtype=torch.float64)), Samples(samples().x[:0], samples().y[:0]), "samples="),
    ],
)
def test_models_and_images_that_do_not_fit(model: nn.Module, data: Samples, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attack_network(model, data, [Adversary("fgm", "2", 0.1, 1)])
    with pytest.raises(OptionError, match="adversaries"):
        attack_network(model, samples(), [])


@pytest.mark.parametrize("eps", [1e-25, 1e-3, 1e18, 3e30])
def test_the_distance_moved_is_that_of_any_size(eps: float) -> None:
    data = Samples(samples().x.float(), samples().y)
    model = linear(torch.randn(2, 6, dtype=torch.float64)).float()
    (strength,) = attack_network(model, Samples(0 * data.x, data.y), [Adversary("fgm", "2", eps, 1)]).strengths
    assert strength.mean_distance == pytest.approx(eps, rel=1e-5)


@pytest.mark.parametrize("name", ["a.png", "a.pdf", "a.SVG"])
def test_a_plot_replaces_that_of_the_same_command_and_no_other_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some_nets.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    command = ["attack", "some_nets:make", "--data", "digits", "--images", "5", "--eps", "1", "--attack", "fgm"]
    command += ["--no-certify", "--quiet", "--plot", name]
    assert main(command) == 0
    first = Path(name).read_bytes()
    assert main(command) == 0
    Path(name).write_bytes(b"something else")
    assert main(command) == 2
    assert "exists and is not a plot of sn-fast" in capsys.readouterr().err
    assert Path(name).read_bytes() == b"something else" != first
    monkeypatch.delitem(sys.modules, "some_nets")


def test_the_command_on_a_run(few_digits: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(
        TrainConfig.create(train_size=60, epochs=1, batch_size=30, steps=1, single=True, evaluation="published"),
        tmp_path / "run",
    ).path
    files = ["--plot", str(tmp_path / "a.png"), "--save", str(tmp_path / "a.npz")]
    options = ["--images", "50", "--attack", "fgm,pgd", "--eps", "0.2,8/10", "--steps", "2", "--quiet", "--json"]
    assert main(["attack", str(run), *options, *files]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = {(row[0], row[2]): row for row in document["rows"]}
    assert set(rows) == {("clean", 0.0), ("fgm", 0.2), ("fgm", 0.8), ("pgm", 0.2), ("pgm", 0.8)}
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    with np.load(tmp_path / "a.npz") as saved:
        assert set(saved.files) == {"x", "y", "fgm_2_0.2", "fgm_2_0.8", "pgm_2_0.2", "pgm_2_0.8"}
        moved = np.linalg.norm((saved["pgm_2_0.8"] - saved["x"]).reshape(50, -1), axis=1)
        assert moved.max() <= 0.8 * (1 + 1e-5)
        assert moved.mean() == pytest.approx(rows["pgm", 0.8][5], rel=1e-5)
    # At the run's own strengths, which are those of the attack however its name is written.
    written = []
    for names in ("wrm,pgm", "WRM,PGD"):
        assert main(["attack", str(run), "--images", "20", "--attack", names, "--quiet", "--json"]) == 0
        written.append(json.loads(capsys.readouterr().out)["rows"])
    assert written[0] == written[1]
    assert [row[2] for row in written[0][1:4]] == pytest.approx([0.15, 0.3, 0.6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nets:make"], "argument --data: is required for this MODEL: give one of digits"),
        (["nets:make", "--data", "digits"], "argument MODEL: there is no module 'nets'"),
        (["nets:make", "--data", "digits", "--images", "0"], "argument --images: invalid value 0: must be an integer"),
        (["nets:make", "--data", "digits", "--part", "all"], "argument --part: invalid value all: choose train"),
        (
            ["nets:make", "--data", "digits", "--save", "a.txt"],
            "argument --save: invalid value a.txt: give",
        ),
        (
            ["nets:make", "--data", "digits", "--save", "nowhere/a.npz"],
            "argument --save: invalid value nowhere/a.npz: there is no folder nowhere",
        ),
        (
            ["torch.nn:Identity", "--data", "digits", "--part", "validation", "--eps", "1"],
            "argument --part: invalid value validation: digits has no such images with these options; choose train or",
        ),
        (["torch.nn:Identity", "--data", "digits"], "argument --eps: is required for this MODEL"),
        (["torch.nn:Identity", "--data", "digits", "--eps", "1/0"], "argument --eps: invalid value 1/0: give numbers"),
        (
            ["torch.nn:Identity", "--data", "digits", "--eps", "-1"],
            "argument --eps: invalid value -1.0: must",
        ),
        (
            ["torch.nn:Identity", "--data", "digits", "--eps", "1", "--attack", "cw"],
            "argument --attack: invalid value cw: choose fgm, pgm or wrm",
        ),
        (
            ["torch.nn:Identity", "--data", "digits", "--eps", "1", "--attack", "fgm,erm"],
            "argument --attack: invalid value erm: choose fgm, pgm or wrm",
        ),
        (["torch.nn:Identity", "--data", "digits", "--eps", "1"], "the model's output has shape"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", *arguments, "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sn-fast: error: {message}")
