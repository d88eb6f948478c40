"""The comparison of projection and parametrization has the numbers of its data."""

from __future__ import annotations

import json
from typing import Any

from .pages import ROOT


def test_table() -> None:
    runs = json.loads((ROOT / "docs" / "results" / "digits_projection.json").read_text(encoding="utf-8"))["runs"]
    page = (ROOT / "docs" / "projection.md").read_text(encoding="utf-8").splitlines()
    shown = [line for line in page if line.startswith("| ") and line.split(" | ")[0].removeprefix("| ").isdigit()]
    assert shown == [row(run) for run in runs]
    assert [run["seed"] for run in runs] == [0, 0, 1, 1, 2, 2]


def row(run: dict[str, Any]) -> str:
    train, test, gap = (run["accuracy"][part] for part in ("train", "test", "gap"))
    shares = train["clean"], test["clean"], train["pgm"], test["pgm"], gap["pgm"]
    norms = run["sigma"].values()
    cells = [str(run["seed"]), run["normalization"], *(f"{100 * share:.1f}" for share in shares)]
    return f"| {' | '.join(cells)} | {min(norms):.3f} to {max(norms):.3f} |"
