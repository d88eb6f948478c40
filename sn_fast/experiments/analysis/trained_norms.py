"""Spectral norms of the layers after training, beside the caps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from .. import figures
from ..networks import layer_norms
from ..reproduction import Outcome
from ..reproduction.grid import FINISHED
from ..training import TrainedNetwork
from .results import Analysis, Row, check_networks
from .runs import distinct_runs, grouped, names, published_order, subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 8  # layers up to which each has a group of bars
_LOGARITHMIC = 30.0  # ratio of the largest to the smallest norm from which a linear axis hides the small ones


@dataclass(frozen=True)
class NetworkNorms:
    """Spectral norm of each layer's true linear map, in order of use, with the weight in use."""

    name: str
    beta: float
    norms: dict[str, float]


@dataclass(frozen=True)
class TrainedNorms(Analysis):
    """Layer norms of networks; see ``trained_norms``.

    Attributes:
        panels: {title: networks}.
    """

    panels: dict[str, tuple[NetworkNorms, ...]]

    columns = ("panel", "network", "beta", "layer", "norm", "norm over cap")

    def rows(self) -> list[Row]:
        """One per network and layer; no "norm over cap" where there is no cap."""
        return [
            (panel, n.name, n.beta, layer, norm, norm / n.beta if math.isfinite(n.beta) else None)
            for panel, networks in self.panels.items()
            for n in networks
            for layer, norm in n.norms.items()
        ]

    def _draw(self) -> Figure:
        longest = max(len(n.norms) for networks in self.panels.values() for n in networks)
        most = max(map(len, self.panels.values()))
        width = max(3.9, min(8.0, 0.7 + 0.17 * longest * (most + 1) if longest <= _MOST_BARS else 0.17 * longest + 2))
        columns = None if width < 5 else min(2 if width < 6.5 else 1, len(self.panels))
        figure, axes = figures.panels(len(self.panels), columns, width=width)
        styles = {n: i for i, n in enumerate(dict.fromkeys(n.name for ns in self.panels.values() for n in ns))}
        for axis, (panel, networks) in zip(axes, self.panels.items()):
            layers = list(dict.fromkeys(layer for n in networks for layer in n.norms))
            if len(layers) <= _MOST_BARS:
                _draw_bars(axis, networks, layers, styles)
            else:
                _draw_points(axis, networks, layers, styles)
            values = [v for n in networks for v in n.norms.values() if v > 0]
            axis.set(title=panel, ylabel="spectral norm σ")
            if values and max(values) > _LOGARITHMIC * min(values):
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
        figures.titled(figure, "Spectral norms of the layers after training")
        figures.legend_below(figure, axes)
        return figure


def trained_norms(outcomes: Iterable[Outcome]) -> TrainedNorms:
    """Layer norms of finished runs; runs that differ in nothing but beta and seed make one panel.

    Raises:
        OptionError: no run has finished.
    """
    runs = [run for run in distinct_runs(outcomes) if run.status == FINISHED]
    if not runs:
        raise OptionError("outcomes", "0 finished runs", "compute the runs first")
    runs.sort(key=lambda run: (published_order(run.config.beta), run.config.seed))
    several = len({run.config.seed for run in runs}) > 1
    groups = grouped(runs, "beta", "seed")
    firsts = [group[0] for group in groups]
    titles = names(firsts) if len(groups) > 1 else [subject(firsts)]
    panels = {}
    for title, group in zip(titles, groups):
        panels[title] = tuple(
            NetworkNorms(
                figures.beta_label(run.config.beta) + (f", seed {run.config.seed}" if several else ""),
                run.config.beta,
                {layer: float(norm) for layer, norm in run.final["sigma"].items()},
            )
            for run in group
        )
    return TrainedNorms(panels)


def network_norms(networks: Mapping[str, Mapping[str, TrainedNetwork]]) -> TrainedNorms:
    """The same, measured anew: {panel: {name: network}}.

    Raises:
        OptionError: there is no network.
    """
    check_networks(networks)
    return TrainedNorms(
        {
            panel: tuple(
                NetworkNorms(name, network.beta, layer_norms(network.model, network.image_shape))
                for name, network in members.items()
            )
            for panel, members in networks.items()
        }
    )


def _draw_bars(axes: Axes, networks: tuple[NetworkNorms, ...], layers: list[str], styles: Mapping[str, int]) -> None:
    width = 0.8 / len(networks)
    for i, network in enumerate(networks):
        at = [x + (i + 0.5) * width - 0.4 for x, layer in enumerate(layers) if layer in network.norms]
        index = styles[network.name]
        axes.bar(
            at,
            [network.norms[layer] for layer in layers if layer in network.norms],
            width,
            color=figures.colour(index),
            hatch=figures.hatch(index),
            edgecolor="white",
            linewidth=0.5,
            label=network.name,
        )
        if math.isfinite(network.beta):
            ends = [x - width / 2 for x in at], [x + width / 2 for x in at]
            axes.hlines([network.beta] * len(at), *ends, color="black", linewidth=1.4, label="cap β")
    slanted: Any = {"rotation": 25, "ha": "right"} if max(map(len, layers)) * len(layers) > 34 else {}
    axes.set_xticks(range(len(layers)), layers, **slanted)
    axes.grid(axis="x", visible=False)


def _draw_points(axes: Axes, networks: tuple[NetworkNorms, ...], layers: list[str], styles: Mapping[str, int]) -> None:
    for network in networks:
        index = styles[network.name]
        x = [i + 1 for i, layer in enumerate(layers) if layer in network.norms]
        axes.plot(x, list(network.norms.values()), **(figures.series(index) | {"linewidth": 0.8}), label=network.name)
        if math.isfinite(network.beta):
            axes.axhline(network.beta, linestyle=":", label="cap β", **figures.GUIDE)
    axes.set_xlabel("layer, in order of use")
