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
from .results import Analysis, Row, check_networks, spread
from .runs import distinct_runs, grouped, names, published_order, representative, subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 8  # layers up to which each has a group of bars
_CAP = "cap β"
_LOGARITHMIC = 30.0  # ratio of the largest to the smallest norm from which a linear axis hides the small ones


@dataclass(frozen=True)
class NetworkNorms:
    """Spectral norm of each layer's true linear map, in order of use, with the weight in use: one value per seed."""

    name: str
    beta: float
    norms: dict[str, tuple[float, ...]]

    def means(self) -> dict[str, float]:
        """Over the seeds."""
        return {layer: math.fsum(values) / len(values) for layer, values in self.norms.items()}

    def errors(self) -> list[float]:
        """Sample standard deviations over the seeds; 0 of one seed."""
        return [spread(values) or 0.0 for values in self.norms.values()]


@dataclass(frozen=True)
class TrainedNorms(Analysis):
    """Layer norms of networks; see ``trained_norms``.

    Attributes:
        panels: {title: networks}.
    """

    panels: dict[str, tuple[NetworkNorms, ...]]

    columns = ("panel", "network", "beta", "layer", "norm", "spread", "norm over cap", "runs")

    def rows(self) -> list[Row]:
        """One per network and layer: means over the seeds; no "norm over cap" where there is no cap."""
        return [
            (panel, n.name, n.beta, layer, norm, spread(values), _over(norm, n.beta), len(values))
            for panel, networks in self.panels.items()
            for n in networks
            for (layer, values), norm in zip(n.norms.items(), n.means().values())
        ]

    def _draw(self) -> Figure:
        longest = max(len(n.norms) for networks in self.panels.values() for n in networks)
        most = max(map(len, self.panels.values()))
        width = max(3.9, min(8.0, 0.7 + 0.17 * longest * (most + 1) if longest <= _MOST_BARS else 0.17 * longest + 2))
        columns = None if width < 5 else min(2 if width < 6.5 else 1, len(self.panels))
        figure, axes = figures.panels(len(self.panels), columns, width=width)
        styles = figures.look_of(n.name for networks in self.panels.values() for n in networks)
        for axis, (panel, networks) in zip(axes, self.panels.items()):
            layers = list(dict.fromkeys(layer for n in networks for layer in n.norms))
            if len(layers) <= _MOST_BARS:
                _draw_bars(axis, networks, layers, styles)
            else:
                _draw_points(axis, networks, layers, styles)
            values = [v for n in networks for v in n.means().values() if v > 0]
            axis.set(title=panel, ylabel="spectral norm σ")
            if values and max(values) > _LOGARITHMIC * min(values):
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
        figures.titled(figure, "Spectral norms of the layers after training")
        figures.legend_below(figure, axes, last=_CAP)
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
    across = ("beta", "seed")
    groups = grouped(runs, *across)
    of_groups = [representative(group, *across) for group in groups]
    titles = names(of_groups) if len(groups) > 1 else [subject(of_groups)]
    panels = {}
    for title, group in zip(titles, groups):
        panels[title] = tuple(
            _of_seeds(figures.beta_label(runs_of_beta[0].config.beta), runs_of_beta)
            for runs_of_beta in grouped(group, "seed")
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
            panel: tuple(NetworkNorms(name, network.beta, _measured(network)) for name, network in members.items())
            for panel, members in networks.items()
        }
    )


def _measured(network: TrainedNetwork) -> dict[str, tuple[float, ...]]:
    return {layer: (norm,) for layer, norm in layer_norms(network.model, network.image_shape).items()}


def _of_seeds(name: str, runs: list[Outcome]) -> NetworkNorms:
    layers = runs[0].final["sigma"]
    return NetworkNorms(
        name, runs[0].config.beta, {layer: tuple(float(run.final["sigma"][layer]) for run in runs) for layer in layers}
    )


def _over(norm: float, cap: float) -> float | None:
    return norm / cap if math.isfinite(cap) else None


def _draw_bars(axes: Axes, networks: tuple[NetworkNorms, ...], layers: list[str], styles: Mapping[str, int]) -> None:
    width = 0.8 / len(networks)
    for i, network in enumerate(networks):
        at = [x + (i + 0.5) * width - 0.4 for x, layer in enumerate(layers) if layer in network.norms]
        index, errors = styles[network.name], network.errors()
        axes.bar(
            at,
            [network.means()[layer] for layer in layers if layer in network.norms],
            width,
            yerr=errors if any(errors) else None,
            capsize=2,
            color=figures.colour(index),
            hatch=figures.hatch(index),
            edgecolor="white",
            linewidth=0.5,
            label=network.name,
        )
        if math.isfinite(network.beta):
            ends = [x - width / 2 for x in at], [x + width / 2 for x in at]
            axes.hlines([network.beta] * len(at), *ends, color="black", linewidth=1.4, label=_CAP)
    slanted: dict[str, Any] = {"rotation": 25, "ha": "right"} if max(map(len, layers)) * len(layers) > 34 else {}
    axes.set_xticks(range(len(layers)), layers, **slanted)
    axes.grid(axis="x", visible=False)


def _draw_points(axes: Axes, networks: tuple[NetworkNorms, ...], layers: list[str], styles: Mapping[str, int]) -> None:
    for network in networks:
        index = styles[network.name]
        x = [i + 1 for i, layer in enumerate(layers) if layer in network.norms]
        axes.plot(x, list(network.means().values()), **(figures.series(index) | {"linewidth": 0.8}), label=network.name)
        if math.isfinite(network.beta):
            axes.axhline(network.beta, linestyle=":", label=_CAP, **figures.GUIDE)
    axes.set_xlabel("layer, in order of use")
