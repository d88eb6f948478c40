"""Accuracy over the number of training images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from .. import figures
from ..reproduction import Outcome
from ..reproduction.grid import FINISHED
from .results import Analysis, Row, mean, spread
from .runs import distinct_runs, grouped, names, published_order, representative, state, subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PARTS = ("train", "test")


@dataclass(frozen=True)
class SizePoint:
    """The runs of one network on one number of training images.

    Attributes:
        train, test: accuracies under the attack trained with, in [0, 1], one per finished run.
        unfinished: {seed: what became of the run}, of the others.
    """

    size: int
    train: tuple[float, ...]
    test: tuple[float, ...]
    unfinished: dict[int, str]


@dataclass(frozen=True)
class SampleSizeSweep(Analysis):
    """Accuracy over the number of training images; see ``sample_size_sweep``.

    Attributes:
        curves: {name of the network: its points, from the smallest size}.
    """

    curves: dict[str, tuple[SizePoint, ...]]
    title: str

    columns = (
        *("network", "training images", "runs", "train accuracy", "train spread", "test accuracy", "test spread"),
        *("gap", "notes"),
    )

    def rows(self) -> list[Row]:
        """One per network and size: means over the finished seeds, sample standard deviations as spreads."""
        rows: list[Row] = []
        for name, points in self.curves.items():
            for p in points:
                gap = mean([a - b for a, b in zip(p.train, p.test)])
                numbers = (mean(p.train), spread(p.train), mean(p.test), spread(p.test), gap)
                notes = "; ".join(f"seed {seed}: {what}" for seed, what in sorted(p.unfinished.items()))
                rows.append((name, p.size, len(p.test), *numbers, notes))
        return rows

    def _draw(self) -> Figure:
        figure, (accuracy, gap) = figures.panels(2, width=4.6, height=3.6)
        sizes = sorted({point.size for points in self.curves.values() for point in points})
        for i, (name, points) in enumerate(self.curves.items()):
            accuracy.plot([], [], color=figures.colour(i), marker=figures.marker(i), label=name)
            for part in _PARTS:
                training = part == "train"
                _plot(
                    accuracy,
                    {p.size: getattr(p, part) for p in points},
                    linestyle="--" if training else "-",
                    alpha=figures.FAINT if training else 1.0,
                    color=figures.colour(i),
                    marker="" if training else figures.marker(i),
                )
            gaps = {p.size: [a - b for a, b in zip(p.train, p.test)] for p in points}
            _plot(gap, gaps, color=figures.colour(i), marker=figures.marker(i))  # dashes are training's
        figures.name_parts(accuracy)
        for axes in (accuracy, gap):
            figures.number_ticks(axes, sizes)
            axes.set(xlabel="number of training images", xlim=(sizes[0] / 1.25, sizes[-1] * 1.25))
        figures.accuracy_axis(accuracy)
        gap.set(ylabel="accuracy gap, training − test (%)")
        figures.titled(figure, f"Over the number of training images, under the attack trained with: {self.title}")
        figures.legend_below(figure, [accuracy, gap])
        return figure


def _plot(axes: Axes, values_of: Mapping[int, Sequence[float]], **look: Any) -> None:
    """Means and spreads over the seeds of each size that has any, in %."""
    drawn = {size: values for size, values in values_of.items() if values}
    errors = [100 * (spread(values) or 0.0) for values in drawn.values()]
    means = figures.percent(mean(values) for values in drawn.values())
    axes.errorbar(list(drawn), means, yerr=errors if any(errors) else None, capsize=3, **look)


def sample_size_sweep(outcomes: Iterable[Outcome], *, full_size: int | None = None) -> SampleSizeSweep:
    """Accuracy on training and test images over the number of training images.

    Runs that differ in nothing but the size and the seed make one curve.

    Args:
        full_size: number of training images of runs with train_size=None.

    Raises:
        OptionError: no run has finished, or full_size is missing.
    """
    runs = distinct_runs(outcomes)
    if not any(run.status == FINISHED for run in runs):
        raise OptionError("outcomes", "0 finished runs", "compute the runs first")
    if full_size is None and any(run.config.train_size is None for run in runs):
        raise OptionError("full_size", None, "there are runs on all images; give their number")
    runs.sort(key=lambda run: published_order(run.config.beta))
    across = ("train_size", "seed")
    groups = grouped(runs, *across)
    of_groups = [representative(group, *across) for group in groups]
    curves = {}
    for name, group in zip(names(of_groups), groups):
        sizes: dict[int, list[Outcome]] = {}
        for run in group:
            sizes.setdefault(run.config.train_size or full_size or 0, []).append(run)
        curves[name] = tuple(_point(size, sizes[size]) for size in sorted(sizes))
    return SampleSizeSweep(curves, subject(of_groups) or "several networks")


def _point(size: int, runs: list[Outcome]) -> SizePoint:
    finished = sorted((run for run in runs if run.status == FINISHED), key=lambda run: run.config.seed)
    train, test = (tuple(run.accuracy(part) for run in finished) for part in _PARTS)
    return SizePoint(size, train, test, {r.config.seed: state(r) for r in runs if r.status != FINISHED})
