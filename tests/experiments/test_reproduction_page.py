"""The numbers of docs/reproduction.md are those of the runs that are kept beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sn_fast.experiments.analysis import accuracy_table
from sn_fast.experiments.reproduction import Store

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reproduction.md"
RUNS = ROOT / "docs" / "results" / "reproduction" / "runs"


def test_the_table_is_that_of_the_runs() -> None:
    (shown,) = re.findall(r"```text\n(accuracy.*?)```", PAGE.read_text(), re.DOTALL)
    table = accuracy_table(Store(RUNS).everything()).text()
    assert shown.splitlines() == table.splitlines()


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_no_run_names_a_machine(name: str) -> None:
    texts = [path.read_text() for path in RUNS.glob(f"*/{name}")]
    assert texts
    assert not [text for text in texts if re.search(r'"data_dir": "|/home/|/tmp/|/root/', text)]
