"""A job of seconds: the real one, on a few of the digits."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sn_fast.training import RunResult, TrainConfig, data, train

FEW = 240
TINY = {"train_size": 60, "epochs": 3, "batch_size": 25, "steps": 2, "eps": 0.3, "seed": 7}


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first digits, so that evaluating all of them takes no time."""
    load = data.load

    def load_few(name: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = load(name)
        return images[:FEW], labels[:FEW]

    monkeypatch.setattr(data, "load", load_few)


@pytest.fixture
def tiny_run(few_digits: None, tmp_path: Path) -> Any:
    """Run a tiny job, with some options changed."""

    def run(name: str = "run", **options: Any) -> RunResult:
        return train(TrainConfig.create(**{**TINY, **options}), tmp_path / name)

    return run


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a package look as if it were not installed."""

    def hide(package: str) -> None:
        class Finder:
            @staticmethod
            def find_spec(name: str, *args: object) -> None:
                if name == package:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        for module in [m for m in sys.modules if m.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])

    return hide


def without_times(value: Any) -> Any:
    """A run's metrics without what a clock said, which no two runs share."""
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if not key.startswith("seconds")}
    return [without_times(v) for v in value] if isinstance(value, list) else value
