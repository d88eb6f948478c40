from __future__ import annotations

import csv
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sn_fast.cli import main
from sn_fast.errors import OptionError
from sn_fast.experiments.data import load_data
from sn_fast.experiments.reports import PARTS, html_page, reproduce
from sn_fast.experiments.training import trained_networks
from sn_fast.theory import margins

from ..reproduction.conftest import OPTIONS, few_digits, tiny

__all__ = ["few_digits"]  # a fixture

VOID = {"meta", "img", "link"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects what a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            given = dict(attrs)
            assert given["alt"]
            self.images.append(given["src"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_all_parts_of_a_grid(tmp_path: Path) -> None:
    report = reproduce(PARTS, tiny(schemes=("fgm",)), tmp_path)
    assert report.missing == {}
    assert report.unfinished == []
    assert len(report.outcomes) == 4  # two betas, each with true and with random labels
    assert {
        "accuracy",
        "training-mlp1_elu-fgm",
        "robustness-mlp1_elu",
        "robustness-mlp1_elu-linf",
        "margins-mlp1_elu",
        "norms",
        "capacities",
    } <= set(report.analyses)
    for name, norm, eps in (("robustness-mlp1_elu", "2", 0.8), ("robustness-mlp1_elu-linf", "inf", 0.15)):
        curves = report.analyses[name].curves  # type: ignore[attr-defined]
        assert {(c.norm, c.unit) for c in curves if c.attack != "WRM"} == {(norm, eps)}
        assert {c.attack for c in curves} == {"FGM", "PGM", *(["WRM"] if norm == "2" else [])}
    paths = report.write(tmp_path, html_page)
    assert {p.suffix for p in paths} == {".png", ".svg", ".csv", ".txt", ".json", ".html"}
    document = json.loads((tmp_path / "report.json").read_text())
    assert document == json.loads(json.dumps(report.document(), allow_nan=False))
    page = Page()
    source = (tmp_path / "report.html").read_text()
    page.feed(source)
    assert page.open == []
    assert len(page.images) == len(report.analyses)
    assert all(image.startswith("data:image/png;base64,") for image in page.images)
    assert not re.search(r"https?://|<script|src=\"(?!data:)", source)  # one file, and nothing runs
    assert "digits: mlp1_elu; FGM" in page.text


def test_without_validation_images_every_cap_is_shown_and_the_report_says_so(tmp_path: Path, capsys) -> None:
    """The test images choose nothing, neither in the table nor in a figure."""
    options = ["--set", "digits", "--arch", "mlp1_elu", "--scheme", "fgm", "--betas", "inf,1,2", "--epochs", "1"]
    options += ["--train-size", "60", "--steps", "1", "--validation-size", "0", "--out", str(tmp_path)]
    assert main(["reproduce", "table", "margins", *options]) == 0
    shown = capsys.readouterr()
    reason = "no beta is chosen: there are no validation images, and every one is shown"
    notes = [f"digits mlp1_elu FGM: {reason}", f"digits mlp1_elu FGM, figures of networks: {reason}"]
    assert [note for note in notes if note in shown.out.splitlines()] == notes
    assert "epochs, accuracy (%) train" in shown.err  # each run is described
    assert json.loads((tmp_path / "report.json").read_text())["notes"] == notes
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert all(note in page.text for note in notes)
    summary = (tmp_path / "figures" / "margins-mlp1_elu-summary.csv").read_text()
    rows = list(csv.reader(io.StringIO(summary)))[1:]
    assert {row[1] for row in rows} == {"no SN (β = ∞)", "β = 1", "β = 2"}
    assert "mode 2" in summary  # of networks trained with FGM, as published


def test_capacities_are_measured_on_the_images_that_each_run_was_trained_on(tmp_path: Path) -> None:
    """Seeds draw other images."""
    grid = tiny(schemes=("erm",), betas=(math.inf,), seeds=(0, 1))
    networks = reproduce(["bounds"], grid, tmp_path).analyses["capacities"].networks  # type: ignore[attr-defined]
    for config, found in zip(grid.runs(), networks):
        train = load_data("digits", **config.data_options()).train
        (network,) = trained_networks(tmp_path / "runs" / config.key()).values()
        lead = margins(network.model(train.x), train.y).detach()
        assert found.margin == pytest.approx(float(lead[lead > 0].median()), rel=1e-5)


def test_exported_numbers_give_the_same_table_and_name_no_machine(tmp_path: Path, capsys) -> None:
    options = ["--set", "digits", "--arch", "mlp1_elu", "--scheme", "erm", "--betas", "inf,1", "--quiet"]
    options += ["--epochs", "1", "--train-size", "60", "--validation-size", "100"]
    folders = ["--out", str(tmp_path / "run"), "--data", str(tmp_path), "--export", str(tmp_path / "exported")]
    assert main(["reproduce", "table", *options, *folders]) == 0
    table = capsys.readouterr().out.partition("report, figures")[0]
    assert main(["reproduce", "table", *options, "--only-report", "--out", str(tmp_path / "exported")]) == 0
    assert capsys.readouterr().out.partition("report, figures")[0] == table
    exported = list((tmp_path / "exported" / "runs").rglob("*.*"))
    assert {path.name for path in exported if path.is_file()} == {"config.json", "metrics.json"}
    assert all(str(tmp_path) not in path.read_text() for path in exported if path.is_file())


def test_what_cannot_be_analysed_is_named_with_its_reason(tmp_path: Path) -> None:
    report = reproduce(PARTS, tiny(), tmp_path, only_report=True)
    assert [o.status for o in report.unfinished] == ["absent"] * 8
    assert {"training-mlp1_elu-erm", "norms", "random-labels"} <= set(report.missing)
    assert "absent" in report.text()
    report.write(tmp_path, html_page)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tables"], "argument WHAT: invalid value tables: choose table, curves"),
        (["table", "--set", "imagenet"], "argument --set: invalid value imagenet: choose digits"),
        (["table", "--betas", "a"], "argument --betas: invalid value a: give numbers"),
        (["table", "--betas", "0"], "argument --betas: invalid value 0.0: must be a number > 0"),
        (["table", "--jobs", "0"], "argument --jobs: invalid value 0: must be an integer >= 1"),
        (["table", "--arch", ""], "argument --arch: invalid value (): give at least one"),
        (["table", "--set", "digits", "--betas", "published"], "argument --betas: invalid value published: there is"),
        (["table", "--data", "/nowhere"], "argument --data: invalid value /nowhere: is not there; give the folder"),
        (["table"], "argument --data: is required for mnist: give the folder"),
        (["table", "--set", "digits", "--export", __file__], f"argument --export: invalid value {__file__}: is a file"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys) -> None:
    assert main(["reproduce", *arguments, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sn-fast: error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_is_named_before_the_runs(tmp_path, capsys) -> None:
    (tmp_path / "file").touch()
    for out, reason in (("file", "is a file; give a folder"), ("file/below", "cannot be made (Not a directory)")):
        path = tmp_path / out
        assert (
            main(["reproduce", "table", "--set", "digits", "--validation-size", "10", "--out", str(path), "--quiet"])
            == 2
        )
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"sn-fast: error: argument --out: invalid value {path}: {reason}")


def test_a_grid_whose_epochs_have_no_step_is_refused(tmp_path) -> None:
    with pytest.raises(OptionError, match=r"batch_size=61: the 60 training images are fewer"):
        reproduce(
            ["table"],
            tiny(options={**OPTIONS, "train_size": 60, "batch_size": 61, "drop_last": True}),
            tmp_path / "out",
        )
    assert not (tmp_path / "out").exists()
