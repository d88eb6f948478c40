from __future__ import annotations

import json
import math
import os
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from torch import nn

from sn_fast.cli import main
from sn_fast.errors import UserError
from sn_fast.inspection import Inspection, LayerMeasurement, inspect_model, plot, table
from sn_fast.inspection.table import document
from sn_fast.layers import operator_of

SMALL = ["norms", "nets:small", "--input-size", "1x6x6", "--threads", "1"]
PNG = b"\x89PNG\r\n\x1a\n"


def small() -> nn.Module:
    import nets

    model: nn.Module = nets.small()
    return model


def truth(model: nn.Module, name: str, size: tuple[int, ...] | None) -> float:
    op = operator_of(model.get_submodule(name), size)
    return float(torch.linalg.svdvals(op.to_dense().detach().double())[0])


def test_the_table(nets, capsys):
    assert main([*SMALL, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    title, _, head, conv, linear, _, *end = out.splitlines()
    assert title == "nets:small, weights as made, input 1x6x6"
    assert head.split()[:3] == ["layer", "type", "input"]
    for line, name, kind, size in ((conv, "conv", "Conv2d 3x3", (6, 6)), (linear, "head", "Linear 3x144", None)):
        cells = line.split()
        assert cells[0] == name
        assert " ".join(cells[1:3]) == kind
        assert cells[3] == ("6x6" if size else "-")
        assert float(cells[4]) <= truth(small(), name, size) <= float(cells[5])
        assert cells[6] == "0.00%"
        assert cells[7] == "dense"
    reshaped = float(torch.linalg.matrix_norm(small().conv.weight.detach().flatten(1), 2))
    assert float(conv.split()[8]) == pytest.approx(reshaped, rel=1e-4)
    off = 100 * (reshaped / truth(small(), "conv", (6, 6)) - 1)
    assert float(conv.split()[9].rstrip("%")) == pytest.approx(off, abs=0.06)
    assert linear.split()[8:] == ["-", "-"]
    assert end[0] == "2 layers measured"
    product = truth(small(), "conv", (6, 6)) * truth(small(), "head", None)
    assert float(end[1].removeprefix("product of the upper bounds ")) == pytest.approx(product, rel=1e-3)
    assert end[2].startswith("largest norm at most ")
    assert end[3].endswith(" s")


def test_json_with_a_checkpoint(nets, capsys, tmp_path):
    model = small()
    with torch.no_grad():
        model.conv.weight.mul_(-7)
    torch.save({"state_dict": {"module." + k: v for k, v in model.state_dict().items()}}, "best.pt")
    assert main([*SMALL, "--checkpoint", "best.pt", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    found = json.loads(out)
    assert err == ""
    assert {k: found[k] for k in ("model", "checkpoint", "input_size", "device", "threads")} == {
        "model": "nets:small",
        "checkpoint": "best.pt",
        "input_size": [1, 6, 6],
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": 1,
    }
    conv, head = found["layers"]
    assert conv["input_size"] == [6, 6]
    assert head["input_size"] is None
    assert conv["lower"] <= truth(model, "conv", (6, 6)) <= conv["upper"] < 1.001 * conv["lower"]
    assert conv["upper"] > 7 * truth(small(), "conv", (6, 6)) * 0.999
    assert conv["reshaped_error"] < 0
    assert head["reshaped"] is None
    assert found["largest"] == "conv"
    assert found["log10_product_of_upper_bounds"] == pytest.approx(math.log10(conv["upper"] * head["upper"]))


def test_a_plot_takes_its_place_as_a_whole(nets, capsys, monkeypatch):
    assert main([*SMALL, "--quiet", "--plot", "a.png"]) == 0
    first = Path("a.png").read_bytes()
    assert first.startswith(PNG)
    assert not list(nets.glob(".*"))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert main([*SMALL, "--quiet", "--plot", "a.png"]) == 2
    out, err = capsys.readouterr()
    assert "2 layers measured" in out
    assert err == "sn-fast: error: argument --plot: cannot write a.png: No space left on device\n"
    assert Path("a.png").read_bytes() == first
    assert not list(nets.glob(".*"))


def test_progress_goes_to_stderr_and_needs_no_tqdm(nets, capsys, monkeypatch):
    assert main(SMALL) == 0
    err = capsys.readouterr().err
    assert "100%" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(SMALL) == 0
    assert capsys.readouterr().err == ""


def test_modules_of_the_working_directory_are_found(nets, capsys, monkeypatch):
    import sys

    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p).resolve() != nets.resolve() and p])
    assert main([*SMALL, "--quiet"]) == 0


def test_threads_are_given_back(nets, capsys):
    before = torch.get_num_threads()
    assert main([*SMALL[:-1], str(before + 1), "--quiet"]) == 0
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "the following arguments are required: MODEL"),
        (["nowhere:make"], "argument MODEL: there is no module 'nowhere'"),
        (["nets:absent"], "argument MODEL: nets has no 'absent'"),
        (["nets:empty"], "argument MODEL: the model has no Linear, Embedding or convolution layer"),
        (["nets:nan", "--input-size", "1x6x6"], "layer conv: its weight has NaN or infinite elements"),
        (["nets:small"], "argument --input-size: the model does not take an input of size 3x224x224"),
        (["nets:small", "--input-size", "6by6"], "argument --input-size: invalid value 6by6"),
        (["nets:small", "--input-size", "0x6"], "argument --input-size: invalid value 0x6"),
        (["nets:small", "--checkpoint", "absent.pt"], "argument --checkpoint: there is no file absent.pt"),
        (["nets:small", "--checkpoint", "nets.py"], "argument --checkpoint: nets.py was not written by torch.save"),
        (["nets:small", "--checkpoint", "a", "--pretrained"], "not allowed with argument"),
        (["nets:small", "--pretrained"], "argument --pretrained: is for names of torchvision and timm"),
        (["nets:small", "--tol", "0"], "argument --tol: invalid value 0"),
        (["nets:small", "--tol", "nan"], "argument --tol: invalid value nan"),
        (["nets:small", "--threads", "0"], "argument --threads: invalid value 0"),
        (["nets:small", "--device", "tpu"], "argument --device: invalid value tpu"),
        (["nets:small", "--include", "("], "argument --include: '(' is not a regular expression"),
        (["nets:small", "--plot", "a.txt"], "argument --plot: invalid value a.txt: the name must end with .png"),
        (["nets:small", "--plot", "no/a.png"], "argument --plot: there is no folder no"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(nets, capsys, argv, expected):
    assert main(["norms", *argv, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sn-fast: error: ")
    assert err.count("\n") == 1
    assert expected in err


def test_packages_that_plots_need(nets, capsys, uninstalled):
    uninstalled("matplotlib")
    assert main([*SMALL, "--plot", "a.png"]) == 2
    assert "the package matplotlib is not installed; run: pip install matplotlib" in capsys.readouterr().err


def test_ctrl_c(nets, capsys, monkeypatch):
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sn_fast.inspection.layers.operator_norm_interval", interrupted)
    assert main([*SMALL, "--quiet", "--plot", "a.png"]) == 130
    assert capsys.readouterr() == ("", "sn-fast: interrupted\n")
    assert not Path("a.png").exists()


def rows(count: int, lower: float, upper: float) -> Inspection:
    return Inspection(tuple(LayerMeasurement(str(i), "Linear", "2x2", None, lower, upper) for i in range(count)))


@pytest.mark.parametrize(("lower", "upper"), [(1.23456789, 1.2345679), (2e-9, 2e-9), (0.99999999, 0.99999999)])
def test_intervals_hold_as_printed(lower, upper):
    line = table(rows(1, lower, upper)).splitlines()[1].split()
    low, high = Decimal(line[4]), Decimal(line[5])
    assert low <= Decimal(lower)
    assert Decimal(upper) <= high
    assert float(high - low) <= 3e-5 * upper


def test_large_products_and_other_facts():
    text = table(rows(400, 100.0, 100.0))
    assert "product of the upper bounds 10^800.00" in text
    assert document(rows(400, 100.0, 100.0))["log10_product_of_upper_bounds"] == pytest.approx(800)
    assert "product of the upper bounds 0" in table(rows(2, 0.0, 0.0))
    assert document(rows(2, 0.0, 0.0))["log10_product_of_upper_bounds"] is None
    json.dumps(document(rows(1, 0.0, 1.0)), allow_nan=False)
    twice = Inspection(tuple(LayerMeasurement("a", "Conv2d", "3x3", (s, s), 1.0, float(s)) for s in (2, 3)), ("free",))
    text = table(twice)
    assert "1 layer measured, at 2 input sizes in all\nproduct of the upper bounds 3\n" in text
    assert "1 other weight not measured: free" in text
    unused = table(Inspection((LayerMeasurement("a", "Conv2d", "3x3", reshaped=2.0, note="not used"),)))
    assert unused.splitlines()[1].split() == ["a", "Conv2d", "3x3", *"-----", "2", "-", "not", "used"]


def test_plots_of_all_kinds(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    found = inspect_model(model, (1, 4, 4))
    with torch.no_grad():
        model[2].weight.mul_(1e4)
    for name, inspection in (("linear.png", found), ("log.svg", inspect_model(model, (1, 4, 4)))):
        plot(inspection, tmp_path / name, "title")
    assert (tmp_path / "linear.png").read_bytes().startswith(PNG)
    assert b"<svg" in (tmp_path / "log.svg").read_bytes()
    with pytest.raises(UserError, match="no layer has a measured norm"):
        plot(Inspection((LayerMeasurement("a", "Conv2d", "3x3"),)), tmp_path / "a.png")
