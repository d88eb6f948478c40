"""Distributions over images: a panel for each group of networks, a histogram for each network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import OptionError
from .. import figures
from .results import Analysis, Row, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
SCALES = ("linear", "log")
_MOST_BINS, _FEWEST_BINS = 50, 10  # between them the square root of the number of images
_OUTSIDE = 0.005  # share of a panel's values left out at each end, so that a long tail does not squeeze the rest
_TOLD = 0.02  # share of one network's values outside the axis from which the figure says so


@dataclass(frozen=True)
class Distribution:
    """Values of all images of one network.

    Attributes:
        quantiles: those of ``QUANTILES``.
        edges: of the bins, which a panel's networks share.
        counts: number of images in each bin; ``below`` and ``above`` of those outside.
    """

    name: str
    images: int
    mean: float
    quantiles: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int


@dataclass(frozen=True)
class Panel:
    """Distributions that are shown together.

    Attributes:
        note: why there are none, else empty.
    """

    title: str
    xlabel: str
    scale: str
    distributions: tuple[Distribution, ...]
    note: str = ""


@dataclass(frozen=True)
class Distributions(Analysis):
    """Histograms over images."""

    title: str
    panels: tuple[Panel, ...]
    row_length: int | None = field(default=None)
    """Number of panels side by side; None: as fits a page."""

    columns = ("panel", "network", "from", "to", "images", "share")

    def rows(self) -> list[Row]:
        """One per network and bin; the first and the last bin of each are what lies outside the panel."""
        return [
            (panel.title, d.name, low, high, count, count / d.images)
            for panel in self.panels
            for d in panel.distributions
            for low, high, count in zip((-math.inf, *d.edges), (*d.edges, math.inf), (d.below, *d.counts, d.above))
        ]

    def tables(self) -> dict[str, Table]:
        """The rows, and "summary": mean and quantiles of each network."""
        columns = ("panel", "network", "images", "mean", *(f"{q:.0%} quantile" for q in QUANTILES), "note")
        rows: list[Row] = []
        for panel in self.panels:
            rows += [(panel.title, d.name, d.images, d.mean, *d.quantiles, "") for d in panel.distributions]
            if panel.note:
                rows.append((panel.title, None, *(None,) * (2 + len(QUANTILES)), panel.note))
        return {**super().tables(), "summary": Table(columns, rows)}

    def _draw(self) -> Figure:
        figure, axes = figures.panels(len(self.panels), self.row_length)
        styles = figures.look_of(d.name for panel in self.panels for d in panel.distributions)
        for axis, panel in zip(axes, self.panels):
            _draw_panel(axis, panel, styles)
        figures.titled(figure, self.title)
        figures.legend_below(figure, axes)
        return figure


def panel_of(title: str, xlabel: str, values: Mapping[str, Tensor], scale: str = "linear") -> Panel:
    """The histograms of some networks' values, (N,) each, over common bins.

    Args:
        scale: of the bins: "linear", or "log", where values that are not positive lie below the first.
    """
    arrays = {name: value.detach().double().cpu() for name, value in values.items()}
    bins = min(_MOST_BINS, max(_FEWEST_BINS, round(min(map(len, arrays.values())) ** 0.5)))
    edges = _edges(torch.cat(list(arrays.values())), scale, bins)
    return Panel(title, xlabel, scale, tuple(_distribution(name, array, edges) for name, array in arrays.items()))


def check_scale(scale: str) -> None:
    """Raise OptionError unless bins can be of this scale."""
    if scale not in SCALES:
        raise OptionError("scale", scale, f"choose {' or '.join(SCALES)}")


def _edges(pooled: Tensor, scale: str, bins: int) -> Tensor:
    if scale == "log":
        pooled = pooled[pooled > 0].log10()
    pooled = pooled[pooled.isfinite()].sort().values
    if not len(pooled):
        pooled = torch.zeros(1, dtype=torch.float64)
    last = len(pooled) - 1
    low, high = float(pooled[round(_OUTSIDE * last)]), float(pooled[round((1 - _OUTSIDE) * last)])
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.5 * abs(low) or 0.5
        low, high = low - room, high + room
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)
    return 10**edges if scale == "log" else edges


def _distribution(name: str, values: Tensor, edges: Tensor) -> Distribution:
    # Bins hold their left end, the last one both.
    place = torch.bucketize(values, edges, right=True) - 1
    bins = len(edges) - 1
    place[values == edges[-1]] = bins - 1
    counts = torch.bincount(place + 1, minlength=bins + 2).tolist()
    ordered = values.sort().values
    last = len(ordered) - 1
    quantiles = tuple(float(ordered[round(q * last)]) for q in QUANTILES)
    return Distribution(
        name=name,
        images=len(values),
        mean=float(values.mean()),
        quantiles=quantiles,
        edges=tuple(edges.tolist()),
        counts=tuple(counts[1:-1]),
        below=counts[0],
        above=counts[-1],
    )


def _unit(panel: Panel) -> tuple[float, str]:
    """A power of ten for a linear axis, and how the label says it; 1 where plain numbers are short enough."""
    largest = max((abs(edge) for d in panel.distributions for edge in (d.edges[0], d.edges[-1])), default=1.0)
    exponent = math.floor(math.log10(largest))
    if panel.scale == "log" or -3 < exponent < 5:
        return 1.0, ""
    return 10.0**exponent, f", in $10^{{{exponent}}}$"


def _draw_panel(axes: Axes, panel: Panel, styles: Mapping[str, int]) -> None:
    outside = []
    unit, in_units = _unit(panel)
    for d in panel.distributions:
        index = styles[d.name]
        share = [100 * count / d.images for count in d.counts]
        edges = [edge / unit for edge in d.edges]
        axes.stairs(share, edges, color=figures.colour(index), fill=True, alpha=0.15)
        line = {"color": figures.colour(index), "linestyle": figures.line(index)}
        axes.stairs(share, edges, linewidth=1.6, label=d.name, **line)
        for count, side in ((d.below, "left"), (d.above, "right")):
            if count > _TOLD * d.images:
                zero = " or zero" if panel.scale == "log" and side == "left" else ""
                outside.append(f"{d.name}: {count / d.images:.0%} further {side}{zero}")
    if panel.note:
        axes.text(0.5, 0.5, figures.folded(panel.note, 38), transform=axes.transAxes, ha="center", va="center")
        axes.grid(visible=False)
        axes.set(xticks=[], yticks=[])
    elif panel.scale == "linear" and min(d.edges[0] for d in panel.distributions) < 0:
        axes.axvline(0, linestyle=":", **figures.GUIDE)
    figures.panel_title(axes, panel.title, *outside)
    axes.set(xlabel=f"{panel.xlabel}{in_units}", ylabel="share of images per bin (%)")
    if panel.scale == "log":
        axes.set_xscale("log")
    elif not panel.note:
        axes.locator_params(axis="x", nbins=6)  # numbers with many digits meet otherwise
