"""README.md: its numbers, its commands, and how long it is."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from .pages import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_prints_the_numbers_of_the_table() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # its operators are small, and other tests may be running
    command = [sys.executable, "examples/true_norms.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    rows = [re.findall(r"\d+\.\d+", line) for line in run.stdout.splitlines()[1:]]
    page = (ROOT / "docs" / "true_norm.md").read_text(encoding="utf-8")
    for text in (README, page):
        shown = [re.findall(r"\d+\.\d+", line) for line in text.splitlines() if re.match(r"(\| `)?Conv\w*2d", line)]
        assert len(shown) == len(rows) == 5
        for row, other in zip(rows, shown):
            assert len(row) == len(other) == 4
            assert all(abs(float(a) - float(b)) < 2e-2 for a, b in zip(row, other))


def test_the_two_commands() -> None:
    """The job and the tests: .ci/run runs the second as it stands here."""
    assert "pip install '.[train]' && sn-fast train\n" in README
    (tests,) = re.findall(r"^pip install '\.\[test\]' && (.*)$", README, re.MULTILINE)
    assert f"step {tests}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.splitlines()) < 110
    assert max(map(len, README.splitlines())) < 200
