"""Numbers in the text of docs/theory.md, and its example."""

from __future__ import annotations

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def test_the_slope_of_the_published_network() -> None:
    norms = [4.02, 18.13, 11.24, 1.74]
    slope = math.prod(norms) * sum(math.prod(norms[: i + 1]) for i in range(4))
    assert slope == pytest.approx(3.3e6, rel=0.01)
    assert "3.3 million" in DOCS


def test_the_detectors_table_on_mnist_is_that_of_its_data() -> None:
    with (ROOT / "docs" / "results" / "reproduction_analyses" / "detector-mnist.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:4] == ["network", "attack", "eps", "seed"]
    of_seeds: dict[tuple[str, str, str], list[list[float]]] = {}
    for network, attack, eps, _, *numbers in rows:
        of_seeds.setdefault((network, attack, f"{float(eps):.2f}"), []).append([float(number) for number in numbers])
    assert len(of_seeds) == 18
    shown = DOCS.partition("--set mnist")[2]
    for key, runs in of_seeds.items():
        assert len(runs) == 3
        cells = [f"{mean(values):.2f} ± {stdev(values):.2f}" for values in zip(*runs)]
        assert f"| {' | '.join((*key, *cells))} |" in shown


@pytest.mark.slow
def test_the_detectors_example_runs(tmp_path: Path) -> None:
    options = ["--seeds", "0", "1", "--betas", "2", "--epochs", "1", "--test-size", "40"]
    options += ["--csv", str(tmp_path / "numbers.csv")]
    command = [sys.executable, "examples/amplification_detector.py", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    head, *rows = run.stdout.splitlines()
    assert head.split()[:4] == ["network", "attack", "eps", "fooled"]
    assert len(rows) == 9
    assert all(len(re.findall(r"\d\.\d\d ± \d\.\d\d", row)) == 4 for row in rows)
    seeds = list(csv.DictReader((tmp_path / "numbers.csv").read_text().splitlines()))
    assert [row["seed"] for row in seeds[:2]] == ["0", "0"]
    assert len(seeds) == 18
    fooled = [float(row["fooled"]) for row in seeds if (row["attack"], row["eps"]) == ("FGM", "0.05")]
    assert f"{mean(fooled):.2f} ± {stdev(fooled):.2f}" in rows[0]
