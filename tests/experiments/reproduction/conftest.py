"""A grid of seconds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sn_fast.experiments.data import samples
from sn_fast.experiments.reproduction import Grid

FEW = 300
OPTIONS: dict[str, Any] = {
    "train_size": 60,
    "epochs": 2,
    "steps": 2,
    "batch_size": 30,
    "validation_size": 100,
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first digits."""
    load = samples.load

    def load_few(name: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = load(name)
        return images[:FEW], labels[:FEW]

    monkeypatch.setattr(samples, "load", load_few)


def tiny(**changes: Any) -> Grid:
    given: dict[str, Any] = {
        "data": "digits",
        "archs": ("mlp1_elu",),
        "schemes": ("erm", "fgm"),
        "betas": (math.inf, 1.0),
        "options": OPTIONS,
    }
    return Grid(**{**given, **changes})
