"""Numbers in the text of docs/theory.md, and its example."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = (Path(__file__).parents[2] / "docs" / "theory.md").read_text(encoding="utf-8")


def test_the_slope_of_the_published_network() -> None:
    norms = [4.02, 18.13, 11.24, 1.74]
    slope = math.prod(norms) * sum(math.prod(norms[: i + 1]) for i in range(4))
    assert slope == pytest.approx(3.3e6, rel=0.01)
    assert "3.3 million" in DOCS


@pytest.mark.slow
def test_the_detectors_example_runs() -> None:
    root = Path(__file__).parents[2]
    options = ["--seeds", "0", "1", "--betas", "2", "--epochs", "1", "--test-size", "40"]
    command = [sys.executable, "examples/amplification_detector.py", *options]
    environment = os.environ | {"PYTHONPATH": str(root)}
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    head, *rows = run.stdout.splitlines()
    assert head.split()[:4] == ["network", "attack", "eps", "fooled"]
    assert len(rows) == 9
    assert all(len(re.findall(r"\d\.\d\d ± \d\.\d\d", row)) == 4 for row in rows)
