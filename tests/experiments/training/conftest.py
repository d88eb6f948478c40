"""A job of seconds: the real one, on a few of the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sn_fast.experiments.data import samples as data
from sn_fast.experiments.training import RunResult, TrainConfig, train

FEW = 240
# On the CPU, where equal runs have equal bits.
TINY = {"train_size": 60, "epochs": 3, "batch_size": 25, "steps": 2, "eps": 0.3, "seed": 7, "device": "cpu"}


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


def without_times(value: Any) -> Any:
    """A run's metrics without what a clock said, which no two runs share."""
    if isinstance(value, dict):
        return {key: without_times(v) for key, v in value.items() if not key.startswith("seconds")}
    return [without_times(v) for v in value] if isinstance(value, list) else value
