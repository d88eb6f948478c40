"""The table that ends a run, made from its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .config import TrainConfig
from .evaluate import evaluation_labels

_NAME_WIDTH = 23
_CELL_WIDTH = 9
_PARTS = {"train": "train", "validation": "val.", "test": "test", "gap": "gap"}


def table(config: TrainConfig, metrics: dict[str, Any]) -> str:
    """Accuracies, their gap, norms and times of every network, as text."""
    networks = list(metrics["networks"].values())
    finals = [network["final"] for network in networks]
    parts = [part for part in _PARTS if part in finals[0]["accuracy"]]
    blanks = [""] * (len(parts) - 1)
    rows = [
        _row("", [_heading(network["beta"]) for network in networks], span=len(parts)),
        _row("accuracy (%)", [_PARTS[part] for part in parts] * len(networks)),
    ]
    for column in finals[0]["accuracy"]["train"]:
        cells = [f"{100 * final['accuracy'][part][column]:.1f}" for final in finals for part in parts]
        scheme = "erm" if column == "clean" else column
        rows.append(_row(f"  {config.adversary(scheme)}{' *' if scheme == config.scheme else ''}", cells))
    if "wrm" in finals[0]["mean_distance"]["train"]:
        moves = [[f"{final['mean_distance'][p]['wrm']:.3f}" for p in parts if p != "gap"] for final in finals]
        rows.append(_row("mean ℓ2 move of WRM", [cell for cells in moves for cell in (*cells, "")]))
    rows += ["", _row("spectral norm", ("sigma", "beta", *blanks[1:]) * len(networks))]
    for layer in finals[0]["sigma"]:
        pairs = [(f"{n['final']['sigma'][layer]:.3f}", f"{float(n['beta']):g}") for n in networks]
        rows.append(_row(f"  {layer}", [cell for pair in pairs for cell in (*pair, *blanks[1:])]))
    times = [cell for final in finals for cell in (f"{final['seconds_per_epoch']:.3f}", *blanks)]
    rows += ["", _row("seconds per epoch", times)]
    if config.stop_accuracy:
        counts = [cell for network in networks for cell in (str(len(network["epochs"])), *blanks)]
        rows.append(_row("epochs", counts))
    labels = "the true labels" if evaluation_labels(config) == "true" else "the network's own predictions for labels"
    note = f"* trained with. Attacks use {labels}, accuracies the true ones; sigma is that of the layer in use."
    return "\n".join(line.rstrip() for line in (_title(config, metrics), "", *rows, "", note))


def _title(config: TrainConfig, metrics: dict[str, Any]) -> str:
    steps = f", {config.steps} steps" if config.scheme in ("pgm", "wrm") else ""
    asked = "all" if config.train_size is None else config.train_size
    images = f"{metrics.get('images', {}).get('train', asked)} training images"  # earlier versions counted none
    if config.classes is not None:
        images += f" of the classes {', '.join(map(str, config.classes))}"
    if config.random_labels:
        images += f", {100 * config.random_labels:g}% of their labels random"
    most = "at most " if config.stop_accuracy else ""
    network = "" if config.arch == "demo" else f"{config.arch}, "
    return (
        f"{config.data}: {network}{images}, {most}{config.epochs} epochs, "
        f"{config.training_adversary}{steps}, seed {config.seed}"
    )


def _heading(beta: float | str) -> str:
    return f"beta = {float(beta):g}" + (" (no cap)" if math.isinf(float(beta)) else "")


def _row(name: str, cells: Sequence[str], span: int = 1) -> str:
    return name.ljust(_NAME_WIDTH) + "".join(cell.rjust(_CELL_WIDTH * span) for cell in cells)
