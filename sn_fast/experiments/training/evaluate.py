"""Accuracy and margins of a trained network on all samples, clean and under attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...theory import margins
from ..data import Samples, Split
from ..networks import evaluating
from .adversary import Adversary
from .config import TrainConfig
from .errors import Diverged

CURVE_FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""eps of the robustness curve, in units of the eps trained with."""
_BATCH_SIZE = 250
_BINS = 40


class Attacked(NamedTuple):
    """Logits (N, classes) at attacked samples, and how far each has moved, (N,), l2."""

    logits: Tensor
    distance: Tensor


def attacked(model: nn.Module, samples: Samples, adversary: Adversary, *, labels: str = "true") -> Attacked:
    """All samples after ``adversary`` has moved them, away from their "true" labels or the "predicted" ones.

    Raises:
        Diverged: a logit is not finite.
    """
    results = []
    with torch.no_grad(), evaluating(model):
        for x, y in samples.batches(_BATCH_SIZE):
            x_adv = adversary.perturb(model, x, y if labels == "true" else None)
            results.append((model(x_adv), (x_adv - x).flatten(1).norm(dim=1)))
    logits, distance = map(torch.cat, zip(*results))
    if not bool(logits.isfinite().all()):
        raise Diverged("a logit became infinite or nan")
    return Attacked(logits, distance)


def accuracy(logits: Tensor, y: Tensor) -> float:
    return float((logits.argmax(dim=1) == y).double().mean())


def swept_adversary(config: TrainConfig) -> Adversary:
    """The attack of the robustness curve: the one trained against, or PGM where training was clean."""
    return config.adversary("pgm" if config.scheme == "erm" else config.scheme)


def evaluations(config: TrainConfig) -> tuple[dict[str, Adversary], list[Adversary]]:
    """The columns of the table by name, and the points of the robustness curve."""
    columns = {"clean": config.adversary("erm")}
    if config.evaluation == "published":
        return columns if config.scheme == "erm" else columns | {config.scheme: config.training_adversary}, []
    columns |= {name: config.adversary(name) for name in ("fgm", "pgm", "wrm")}
    swept = swept_adversary(config)
    return columns, [swept.scaled(factor) if factor else columns["clean"] for factor in CURVE_FACTORS]


def evaluation_labels(config: TrainConfig) -> str:
    """What the evaluation's attacks move away from."""
    return "predicted" if config.evaluation == "published" else "true"


def evaluate(model: nn.Module, split: Split, config: TrainConfig, advance: Callable[[], object]) -> dict[str, Any]:
    """What the report and the plots show of a trained network, norms aside. ``advance`` is called after each attack."""
    columns, curve = evaluations(config)
    labels = evaluation_labels(config)
    results = {}
    for adversary in distinct(columns, curve):
        for part, samples in split.items():
            results[part, adversary] = attacked(model, samples, adversary, labels=labels)
            advance()

    by_part: dict[str, dict[str, float]] = {}
    distance, curves, lead = {}, {}, {}
    for part, samples in split.items():
        by_part[part] = {name: accuracy(results[part, a].logits, samples.y) for name, a in columns.items()}
        distance[part] = {name: float(results[part, a].distance.mean()) for name, a in columns.items()}
        curves[part] = [accuracy(results[part, a].logits, samples.y) for a in curve]
        lead[part] = margins(results[part, config.training_adversary].logits, samples.y)
    strengths = [factor * swept_adversary(config).eps for factor in CURVE_FACTORS]
    by_part["gap"] = {name: by_part["train"][name] - by_part["test"][name] for name in columns}
    return {
        "accuracy": by_part,
        "mean_distance": distance,
        **({"curve": {"eps": strengths, **curves}} if curve else {}),
        "margins": _histograms(lead),
    }


def distinct(columns: dict[str, Adversary], curve: list[Adversary]) -> list[Adversary]:
    """Each attack once: that of the training eps is a column of the table and a point of the curve."""
    return list(dict.fromkeys((*columns.values(), *curve)))


def _histograms(values: dict[str, Tensor]) -> dict[str, list[float]]:
    """Counts over common bins, which cover all values."""
    arrays = {part: value.double().numpy(force=True) for part, value in values.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(arrays.values())), bins=_BINS)
    counts = {part: np.histogram(array, edges)[0].tolist() for part, array in arrays.items()}
    return {"edges": edges.tolist(), **counts}
