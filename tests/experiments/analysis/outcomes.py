"""Outcomes of runs that were never computed, with numbers of the test's choice."""

from __future__ import annotations

import math
from typing import Any

from sn_fast.experiments.reproduction import Outcome
from sn_fast.experiments.training import TrainConfig


def config(**options: Any) -> TrainConfig:
    """A published run on MNIST, with some options changed."""
    given = {"data": "mnist", "arch": "mlp1_relu_sn", "scheme": "fgm", "beta": math.inf, "single": True}
    return TrainConfig.create(**{**given, **options})


def outcome(
    train: float = 0.9, validation: float | None = 0.8, test: float = 0.7, *, trained: int = 4, **options: Any
) -> Outcome:
    """A finished run of so many epochs with these accuracies."""
    of = config(**options)
    column = "clean" if of.scheme == "erm" else of.scheme
    parts = {"train": train, "validation": validation, "test": test}
    sigma = {"hidden": min(of.beta, 3.0), "fc": min(of.beta, 1.5)}
    records = [
        {
            "epoch": epoch,
            "loss": 1 / epoch,
            "train_accuracy": train * epoch / trained,
            "sigma": sigma,
            **({"test_loss": 2 / epoch, "test_accuracy": test * epoch / trained} if epoch % 2 == 0 else {}),
        }
        for epoch in range(1, trained + 1)
    ]
    final = {
        "accuracy": {part: {column: value} for part, value in parts.items() if value is not None},
        "sigma": sigma,
    }
    return Outcome(of, "finished", trained, {"beta": str(of.beta), "epochs": records, "final": final})


def lost(status: str, reason: str = "", *, trained: int = 0, **options: Any) -> Outcome:
    """A run without a result."""
    records = [{"epoch": e, "loss": 9.0, "train_accuracy": 0.5} for e in range(1, trained + 1)]
    return Outcome(config(**options), status, trained, {"epochs": records}, reason)
