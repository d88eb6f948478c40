"""Plots of a run, drawn from its metrics alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import figures
from .config import TrainConfig
from .evaluate import swept_adversary
from .run_folder import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BOUNDARY = "decision boundary"
_MOST_NAMED = 8  # layers up to which a legend names each

Networks = dict[str, dict[str, Any]]


def write_plots(folder: RunFolder, config: TrainConfig, metrics: dict[str, Any]) -> None:
    """robustness.png (not of the published evaluation), learning.png, margins.png and sigma.png of a finished run."""
    draw: dict[str, Callable[[TrainConfig, Networks], Figure]] = {
        **({"robustness.png": robustness} if config.evaluation == "curves" else {}),
        "learning.png": learning,
        "margins.png": margins,
        "sigma.png": sigma,
    }
    with figures.style():
        for name, plot in draw.items():
            folder.write(name, figures.encoded(plot(config, metrics["networks"]), "png"))


def robustness(config: TrainConfig, networks: Networks) -> Figure:
    """Accuracy against the strength of the attack."""
    adversary = swept_adversary(config)
    figure, (axes,) = figures.panels(1, width=7.0, height=3.7)
    for index, network in _numbered(networks):
        curve = network["final"]["curve"]
        _plot(axes, index, network, curve["eps"], curve["train"], training=True)
        _plot(axes, index, network, curve["eps"], curve["test"])
    figures.name_parts(axes)
    if config.scheme != "erm":
        axes.axvline(adversary.eps, linestyle=":", label=f"ε trained with, {adversary.eps:.3g}", **figures.GUIDE)
    axes.set_xlabel(figures.eps_label(adversary.scheme, config.norm))
    figures.accuracy_axis(axes)
    figures.titled(figure, f"{_subject(config)}: accuracy under {adversary.scheme.upper()} of growing strength")
    figures.legend_below(figure, [axes])
    return figure


def learning(config: TrainConfig, networks: Networks) -> Figure:
    """Accuracy under the training scheme, epoch by epoch."""
    figure, (axes,) = figures.panels(1, width=7.0, height=3.7)
    for index, network in _numbered(networks):
        epochs = network["epochs"]
        tested = [record for record in epochs if "test_accuracy" in record]
        _plot(axes, index, network, *_series(epochs, "train_accuracy"), training=True)
        _plot(axes, index, network, *_series(tested, "test_accuracy"))
    figures.name_parts(axes)
    axes.set(xlabel="epoch", xlim=(0, None))
    figures.accuracy_axis(axes, f"{_accuracy_name(config)} (%)")
    figures.titled(figure, f"{_subject(config)}: {_accuracy_name(config)} while training")
    figures.legend_below(figure, [axes])
    return figure


def margins(config: TrainConfig, networks: Networks) -> Figure:
    """How far, in logits, the true class is ahead of the next."""
    figure, panels = figures.panels(len(networks), width=4.8)
    where = "on clean images" if config.scheme == "erm" else f"under {config.training_adversary}"
    for axes, (index, network) in zip(panels, _numbered(networks)):
        histogram = network["final"]["margins"]
        edges = histogram["edges"]
        width = edges[1] - edges[0]
        train, test = (figures.percent(n / sum(histogram[p]) for n in histogram[p]) for p in ("train", "test"))
        axes.stairs(train, edges, color=figures.colour(index), fill=True, alpha=0.3)
        axes.stairs(test, edges, color=figures.colour(index), linewidth=1.8)
        axes.axvline(0, linestyle=":", label=_BOUNDARY, **figures.GUIDE)
        axes.set(title=_label(network), xlabel="margin (logits)", ylabel=f"share of images (%, bins of {width:.2g})")
    panels[0].fill_between([], [], color="0.2", alpha=0.3, label="training")
    panels[0].plot([], [], color="0.2", label="test")
    figures.titled(figure, f"{_subject(config)}: margins {where}")
    figures.legend_below(figure, panels, last=_BOUNDARY)
    return figure


def sigma(config: TrainConfig, networks: Networks) -> Figure:
    """True spectral norm of each layer's weight in use, at the epochs that have it measured."""
    figure, panels = figures.panels(len(networks), width=4.8, sharey=True)
    layers = list(next(iter(networks.values()))["epochs"][0]["sigma"])
    named = len(layers) <= _MOST_NAMED
    for axes, (_, network) in zip(panels, _numbered(networks)):
        epochs = [record for record in network["epochs"] if "sigma" in record]
        for i, layer in enumerate(layers):
            colour = figures.depth_colours()(i / max(1, len(layers) - 1))
            style = {"color": figures.colour(i), "linestyle": figures.line(i), "label": layer}
            x, y = [record["epoch"] for record in epochs], [record["sigma"][layer] for record in epochs]
            axes.plot(x, y, linewidth=1.2, **(style if named else {"color": colour}))
        beta = float(network["beta"])
        if math.isfinite(beta):
            axes.axhline(beta, color="black", linestyle=(0, (4, 3)), linewidth=1, label=figures.beta_label(beta))
        axes.set(title=_label(network), xlabel="epoch", xlim=(0, None), ylim=(0, None))
    panels[0].set_ylabel("spectral norm σ of the layer in use")
    if not named:
        figures.depth_bar(figure, panels, len(layers))
    figures.titled(figure, f"{_subject(config)}: spectral norm of the layers")
    figures.legend_below(figure, panels)
    return figure


def _plot(
    axes: Axes, index: int, network: dict[str, Any], x: list[Any], y: list[float], *, training: bool = False
) -> None:
    if training:
        axes.plot(x, figures.percent(y), "--", color=figures.colour(index), alpha=figures.FAINT)
    else:
        marker = figures.marker(index)
        axes.plot(x, figures.percent(y), color=figures.colour(index), marker=marker, label=_label(network))


def _numbered(networks: Networks) -> list[tuple[int, dict[str, Any]]]:
    """Each network with its number in ``figures.series``: 0 without a cap, 1 with one."""
    return [(int(math.isfinite(float(network["beta"]))), network) for network in networks.values()]


def _label(network: dict[str, Any]) -> str:
    return figures.beta_label(float(network["beta"]))


def _series(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    return [record["epoch"] for record in records], [record[key] for record in records]


def _subject(config: TrainConfig) -> str:
    return f"{config.data}, trained with {config.scheme.upper()}"


def _accuracy_name(config: TrainConfig) -> str:
    return "clean accuracy" if config.scheme == "erm" else f"accuracy under {config.scheme.upper()}"
