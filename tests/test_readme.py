"""What the README shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_blocks_run_in_order() -> None:
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    model, weight = namespace["model"], namespace["weight"]
    assert float((model[0].weight - weight).detach().abs().max()) < 1e-3  # type: ignore[index]


def test_example_prints_what_the_readme_shows() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # its operators are small, and other tests may be running
    command = [sys.executable, "examples/true_norms.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    shown = re.search(r"examples/true_norms.*?```\n(.*?)```", README, re.DOTALL)
    assert shown
    numbers = [re.findall(r"\d+\.\d+", text) for text in (run.stdout, shown.group(1))]
    assert len(numbers[0]) == len(numbers[1]) == 20
    assert all(abs(float(a) - float(b)) < 2e-2 for a, b in zip(*numbers))


def test_table_is_what_was_measured() -> None:
    command = [sys.executable, "examples/readme_table.py", "docs/results/digits_five_seeds.json"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert table in README


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) >= 5
    assert [target for target in targets if not (ROOT / target).exists()] == []
