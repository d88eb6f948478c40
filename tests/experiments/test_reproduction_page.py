"""The numbers of docs/reproduction.md are those of the runs that are kept beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sn_fast.experiments import figures
from sn_fast.experiments.analysis import accuracy_table
from sn_fast.experiments.reproduction import Store

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reproduction.md"
RESULTS = ROOT / "docs" / "results" / "reproduction"
FOLDERS = ("runs_cifar10", "runs")  # in the order of their tables
ALEXNET = ("alexnet_sn", "erm")


def test_the_tables_are_those_of_the_runs() -> None:
    shown = re.findall(r"```text\n(accuracy.*?)```", PAGE.read_text(), re.DOTALL)
    tables = [accuracy_table(Store(RESULTS / folder).everything()).text() for folder in FOLDERS]
    assert [table.splitlines() for table in shown] == [table.splitlines() for table in tables]


def test_the_table_of_random_labels_is_that_of_the_runs() -> None:
    rows = []
    for labels, folder in (("true", "runs_cifar10"), ("random", "runs_random_labels")):
        runs = [run for run in Store(RESULTS / folder).everything() if (run.config.arch, run.config.scheme) == ALEXNET]
        for run in sorted(runs, key=lambda run: -run.config.beta):
            accuracy = run.final["accuracy"]
            assert (run.config.random_labels, run.status) == (float(labels == "random"), "finished")
            rows.append(
                f"| {labels} | {figures.beta_label(run.config.beta)} | {len(run.network['epochs'])} "
                f"| {100 * accuracy['train']['clean']:.1f} | {100 * accuracy['test']['clean']:.1f} |"
            )
    assert re.findall(r"^\| (?:true|random) \|.*", PAGE.read_text(), re.MULTILINE) == rows


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
@pytest.mark.parametrize("folder", [*FOLDERS, "runs_random_labels"])
def test_no_run_names_a_machine(folder: str, name: str) -> None:
    texts = [path.read_text() for path in (RESULTS / folder).glob(f"*/{name}")]
    assert texts
    assert not [text for text in texts if re.search(r'"data_dir": "|/home/|/tmp/|/root/', text)]
