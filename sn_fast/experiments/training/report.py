"""The table that ends a run, made from its metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .config import TrainConfig

_NAME_WIDTH = 23
_CELL_WIDTH = 9
_PARTS = ("train", "test", "gap")


def table(config: TrainConfig, metrics: dict[str, Any]) -> str:
    """Accuracies, their gap, norms and times of every network, as text."""
    networks = list(metrics["networks"].values())
    finals = [network["final"] for network in networks]
    rows = [
        _row("", [_heading(network["beta"]) for network in networks], span=3),
        _row("accuracy (%)", _PARTS * len(networks)),
    ]
    for column in finals[0]["accuracy"]["train"]:
        cells = [f"{100 * final['accuracy'][part][column]:.1f}" for final in finals for part in _PARTS]
        scheme = "erm" if column == "clean" else column
        rows.append(_row(f"  {config.adversary(scheme)}{' *' if scheme == config.scheme else ''}", cells))
    cells = [cell for f in finals for cell in (*(f"{f['mean_distance'][part]['wrm']:.3f}" for part in _PARTS[:2]), "")]
    rows += [_row("mean ℓ2 move of WRM", cells), "", _row("spectral norm", ("sigma", "beta", "") * len(networks))]
    for layer in finals[0]["sigma"]:
        cells = [cell for n in networks for cell in (f"{n['final']['sigma'][layer]:.3f}", f"{float(n['beta']):g}", "")]
        rows.append(_row(f"  {layer}", cells))
    times = [cell for final in finals for cell in (f"{final['seconds_per_epoch']:.3f}", "", "")]
    rows += ["", _row("seconds per epoch", times)]
    note = "* trained with. Attacks and accuracies use the true labels; sigma is that of the layer in use."
    return "\n".join(line.rstrip() for line in (_title(config), "", *rows, "", note))


def _title(config: TrainConfig) -> str:
    steps = f", {config.steps} steps" if config.scheme in ("pgm", "wrm") else ""
    return (
        f"{config.data}: {config.train_size} training images, {config.epochs} epochs, "
        f"{config.training_adversary}{steps}, seed {config.seed}"
    )


def _heading(beta: float | str) -> str:
    return f"beta = {float(beta):g}" + (" (no cap)" if math.isinf(float(beta)) else "")


def _row(name: str, cells: Sequence[str], span: int = 1) -> str:
    return name.ljust(_NAME_WIDTH) + "".join(cell.rjust(_CELL_WIDTH * span) for cell in cells)
