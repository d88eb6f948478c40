"""Plots of a run, drawn from its metrics alone."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import require
from .config import TrainConfig
from .evaluate import swept_adversary
from .run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart. The capped network is last, also when it is alone.
_NETWORK_COLOURS = ("#D55E00", "#0072B2")
_LAYER_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "axes.titlesize": "medium",
    "figure.titlesize": "large",
}
_DPI = 150

Networks = dict[str, dict[str, Any]]


def write_plots(folder: RunFolder, config: TrainConfig, metrics: dict[str, Any]) -> None:
    """robustness.png (not of the published evaluation), learning.png, margins.png and sigma.png of a finished run."""
    draw: dict[str, Callable[[TrainConfig, Networks], Figure]] = {
        **({"robustness.png": robustness} if config.evaluation == "curves" else {}),
        "learning.png": learning,
        "margins.png": margins,
        "sigma.png": sigma,
    }
    with require("matplotlib").rc_context(_STYLE):
        for name, plot in draw.items():
            image = io.BytesIO()
            plot(config, metrics["networks"]).savefig(image, dpi=_DPI)
            folder.write(name, image.getvalue())


def robustness(config: TrainConfig, networks: Networks) -> Figure:
    """Accuracy against the strength of the attack."""
    adversary = swept_adversary(config)
    figure = _figure(7.0, 4.4)
    axes = figure.subplots()
    for colour, network in _coloured(networks):
        curve = network["final"]["curve"]
        label = _label(network)
        axes.plot(curve["eps"], _percent(curve["test"]), "o-", color=colour, markersize=4, label=f"{label}, test")
        axes.plot(curve["eps"], _percent(curve["train"]), "--", color=colour, alpha=0.4, label=f"{label}, training")
    if config.scheme != "erm":
        axes.axvline(adversary.eps, color="0.4", linestyle=":", label=f"ε trained with, {adversary.eps:.3g}")
    unit = "1/(2γ)" if adversary.scheme == "wrm" else f"ℓ{_norm(config)} radius, pixels in [0, 1]"
    axes.set(
        title=f"{_subject(config)}: accuracy under {adversary.scheme.upper()} of growing strength",
        xlabel=f"ε of the attack ({unit})",
        ylabel="accuracy (%)",
        ylim=(0, 102),
    )
    axes.legend()
    return figure


def learning(config: TrainConfig, networks: Networks) -> Figure:
    """Accuracy under the training scheme, epoch by epoch."""
    figure = _figure(7.0, 4.4)
    axes = figure.subplots()
    for colour, network in _coloured(networks):
        epochs = network["epochs"]
        tested = [record for record in epochs if "test_accuracy" in record]
        x, y = _series(epochs, "train_accuracy")
        axes.plot(x, _percent(y), "--", color=colour, alpha=0.5, label=f"{_label(network)}, training")
        x, y = _series(tested, "test_accuracy")
        axes.plot(x, _percent(y), "o-", color=colour, markersize=4, label=f"{_label(network)}, test")
    axes.set(
        title=f"{_subject(config)}: {_accuracy_name(config)} while training",
        xlabel="epoch",
        ylabel=f"{_accuracy_name(config)} (%)",
        xlim=(0, None),
        ylim=(0, 102),
    )
    axes.legend()
    return figure


def margins(config: TrainConfig, networks: Networks) -> Figure:
    """How far, in logits, the true class is ahead of the next."""
    figure = _figure(*_panels_size(networks))
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    where = "on clean images" if config.scheme == "erm" else f"under {config.training_adversary}"
    figure.suptitle(f"{_subject(config)}: margins {where}")
    for axes, (colour, network) in zip(panels, _coloured(networks)):
        histogram = network["final"]["margins"]
        edges = histogram["edges"]
        width = edges[1] - edges[0]
        for part, style in (("train", {"fill": True, "alpha": 0.3}), ("test", {"linewidth": 1.8})):
            counts = histogram[part]
            share = [100 * count / sum(counts) for count in counts]
            name = {"train": "training", "test": "test"}[part]
            axes.stairs(share, edges, color=colour, label=name, **style)
        axes.axvline(0, color="0.4", linestyle=":", label="decision boundary")
        axes.set(title=_label(network), xlabel="margin (logits)", ylabel=f"share of images (%, bins of {width:.2g})")
        axes.legend()
    return figure


def sigma(config: TrainConfig, networks: Networks) -> Figure:
    """True spectral norm of each layer's weight in use, epoch by epoch."""
    figure = _figure(*_panels_size(networks))
    panels = figure.subplots(1, len(networks), squeeze=False, sharey=True)[0]
    figure.suptitle(f"{_subject(config)}: spectral norm of the layers")
    for axes, (_, network) in zip(panels, _coloured(networks)):
        epochs = network["epochs"]
        for colour, layer in zip(itertools.cycle(_LAYER_COLOURS), epochs[0]["sigma"]):
            values = [record["sigma"][layer] for record in epochs]
            axes.plot([record["epoch"] for record in epochs], values, color=colour, linewidth=1.2, label=layer)
        beta = float(network["beta"])
        if math.isfinite(beta):
            axes.axhline(beta, color="black", linestyle="--", linewidth=1, label=f"β = {beta:g}")
        axes.set(title=_label(network), xlabel="epoch", xlim=(0, None), ylim=(0, None))
        axes.legend(ncols=2)
    panels[0].set_ylabel("spectral norm σ of the layer in use")
    return figure


def _panels_size(networks: Networks) -> tuple[float, float]:
    return max(4.8 * len(networks), 6.0), 3.9


def _figure(width: float, height: float) -> Figure:
    figure: Figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def _coloured(networks: Networks) -> list[tuple[str, dict[str, Any]]]:
    return list(zip(_NETWORK_COLOURS[-len(networks) :], networks.values()))


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [record["epoch"] for record in records], [record[key] for record in records]


def _label(network: dict[str, Any]) -> str:
    beta = float(network["beta"])
    return f"β = {beta:g}" if math.isfinite(beta) else "no normalisation (β = ∞)"


def _percent(values: list[float]) -> list[float]:
    return [100 * value for value in values]


def _norm(config: TrainConfig) -> str:
    return config.norm.replace("inf", "∞")


def _subject(config: TrainConfig) -> str:
    return f"{config.data}, trained with {config.scheme.upper()}"


def _accuracy_name(config: TrainConfig) -> str:
    return "clean accuracy" if config.scheme == "erm" else f"accuracy under {config.scheme.upper()}"
