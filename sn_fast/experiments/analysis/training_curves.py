"""Loss and accuracy while training: of any runs, and of those with random labels beside those with true ones."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from .. import figures
from ..reproduction import Outcome
from ..reproduction.grid import DIVERGED, FINISHED
from .results import Analysis, Cell, Row, Table
from .runs import distinct_runs, grouped, names, published_order, representative, state, subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FIELDS = ("loss", "test_loss", "train_accuracy", "test_accuracy")
_MOST_MARKERS = 15
_SEED = re.compile(r"(?:^|, )seed \d+")
_LOGARITHMIC = 8  # ratio of the longest run to the shortest from which a linear axis hides the short ones


@dataclass(frozen=True)
class Curve:
    """What the epochs of one run gave.

    Attributes:
        name: of the run, beside the others.
        state: "finished", or what became of it.
        epochs: numbers of the epochs, from 1.
        loss, train_accuracy: mean over each epoch's attacked batches while they were trained on; None: no such number.
        test_loss, test_accuracy: on the attacked test images, after those epochs that measured it.
        final: accuracy on all images of a part under that attack, {"train": ..., "test": ...}; of a finished run.
    """

    name: str
    state: str
    epochs: tuple[int, ...]
    loss: tuple[float | None, ...]
    test_loss: tuple[float | None, ...]
    train_accuracy: tuple[float | None, ...]
    test_accuracy: tuple[float | None, ...]
    final: Mapping[str, float] = field(default_factory=dict)

    def points(self, quantity: str) -> tuple[list[int], list[float]]:
        """The epochs that have this number, and the number."""
        found = [(e, v) for e, v in zip(self.epochs, getattr(self, quantity)) if v is not None]
        return [e for e, _ in found], [v for _, v in found]


@dataclass(frozen=True)
class TrainingCurves(Analysis):
    """Loss and accuracy per epoch of several runs; see ``training_curves``."""

    curves: tuple[Curve, ...]
    title: str

    columns = ("run", "state", "epoch", "loss", "test loss", "train accuracy", "test accuracy")

    def rows(self) -> list[Row]:
        """One per run and epoch; a run without an epoch has one row."""
        return [row for curve in self.curves for row in _rows(curve)]

    def _draw(self) -> Figure:
        figure, (loss, accuracy) = figures.panels(2, width=4.6, height=3.6)
        for curve, look in zip(self.curves, _looks(self.curves)):
            accuracy.plot([], [], **look, label=_label(curve))
            for axes, kind in ((loss, "loss"), (accuracy, "accuracy")):
                _plot(axes, curve, "loss" if kind == "loss" else f"train_{kind}", look, "--", training=True)
                _plot(axes, curve, f"test_{kind}", look, "-")
        figures.name_parts(accuracy)
        loss.set(title="Loss", xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
        figures.logarithmic(loss.yaxis)
        accuracy.set(title="Accuracy", xlabel="epoch")
        figures.accuracy_axis(accuracy)
        figures.titled(figure, f"While training, under the attack trained with: {self.title}")
        figures.legend_below(figure, [loss, accuracy])
        return figure


def training_curves(outcomes: Iterable[Outcome]) -> TrainingCurves:
    """Loss and accuracy per epoch of runs, also of those that have not finished.

    Raises:
        OptionError: there is no run, or none with an epoch.
    """
    runs = distinct_runs(outcomes)
    curves = tuple(_curve(name, run) for name, run in zip(names(runs), runs))
    _check_epochs(runs)
    return TrainingCurves(curves, subject(runs) or "several runs")


@dataclass(frozen=True)
class RandomLabelFitting(Analysis):
    """Training accuracy with true and with random labels; see ``random_label_fitting``.

    Attributes:
        panels: {title: {curves}}, one panel per data set, network and scheme.
    """

    panels: dict[str, tuple[Curve, ...]]

    columns = ("panel", "run", "state", "epoch", "train accuracy")

    def rows(self) -> list[Row]:
        """One per run and epoch; a run without an epoch has one row."""
        return [(panel, *row[:3], row[5]) for panel, curves in self.panels.items() for c in curves for row in _rows(c)]

    def tables(self) -> dict[str, Table]:
        """``rows``, and as "summary" how each run has ended."""
        columns = ("labels and cap", "panel", "state", "epochs", "train accuracy", "test accuracy")
        ends: list[Row] = [
            (c.name, panel, c.state, len(c.epochs), c.final.get("train"), c.final.get("test"))
            for panel, curves in self.panels.items()
            for c in curves
        ]
        return super().tables() | {"summary": Table(columns, ends)}

    def _draw(self) -> Figure:
        """Colours tell caps, lines tell labels; the seeds of both look alike."""
        figure, shown = figures.panels(len(self.panels))
        names_of = [_fitted(curve) for curves in self.panels.values() for curve in curves]
        caps = figures.look_of(cap for _, cap in names_of)
        labels = {name: i for i, name in enumerate(sorted({name for name, _ in names_of}))}  # random before true
        for axis, (panel, curves) in zip(shown, self.panels.items()):
            for curve in curves:
                name, cap = _fitted(curve)
                look = {"color": figures.colour(caps[cap]), "marker": figures.marker(caps[cap])}
                _plot(axis, curve, "train_accuracy", look, figures.line(labels[name]), label=f"{name}, {cap}")
            lengths = [len(curve.epochs) for curve in curves if curve.epochs]
            if lengths and max(lengths) > _LOGARITHMIC * min(lengths):
                axis.set_xscale("log")
            figures.panel_title(axis, panel)
            axis.set(xlabel="epoch")
            figures.accuracy_axis(axis, "training accuracy (%)")
        figures.titled(figure, "Fitting random and true labels, under the attack trained with")
        figures.legend_below(figure, shown)
        return figure


def random_label_fitting(outcomes: Iterable[Outcome]) -> RandomLabelFitting:
    """How well training fits random labels and true ones, with and without normalisation.

    Runs that differ in nothing but beta, seed and the share of random labels make one panel.

    Raises:
        OptionError: there is no run with random labels, none with an epoch, or no run.
    """
    runs = distinct_runs(outcomes)
    if not any(run.config.random_labels for run in runs):
        raise OptionError("outcomes", f"{len(runs)} runs", "none has random labels; add runs with random_labels > 0")
    _check_epochs(runs)
    runs.sort(key=lambda run: (run.config.random_labels, published_order(run.config.beta), run.config.seed))
    across = ("beta", "seed", "random_labels")
    groups = grouped(runs, *across)
    of_run = dict(zip((run.config.key() for run in runs), _fitting_names(runs)))
    of_groups = [representative(group, *across) for group in groups]
    titles = names(of_groups) if len(groups) > 1 else [subject(of_groups)]
    return RandomLabelFitting(
        {title: tuple(_curve(of_run[run.config.key()], run) for run in group) for title, group in zip(titles, groups)}
    )


def _fitting_names(runs: Sequence[Outcome]) -> list[str]:
    """Names that are the same in all panels: labels, beta and, where there are several, seed."""
    seeds = {run.config.seed for run in runs}
    return [
        ", ".join(
            (
                "true labels" if not run.config.random_labels else _share(run.config.random_labels),
                figures.beta_label(run.config.beta),
                *([f"seed {run.config.seed}"] if len(seeds) > 1 else []),
            )
        )
        for run in runs
    ]


def _fitted(curve: Curve) -> tuple[str, str]:
    """The labels and the cap in the name of a curve."""
    labels, cap = curve.name.split(", ")[:2]
    return labels, cap


def _share(random_labels: float) -> str:
    return "random labels" if random_labels == 1 else f"{random_labels:.0%} random labels"


def _curve(name: str, run: Outcome) -> Curve:
    epochs: Sequence[Mapping[str, Any]] = run.network.get("epochs", ())
    values = {name: tuple(_number(record.get(name)) for record in epochs) for name in _FIELDS}
    final = {part: run.accuracy(part) for part in ("train", "test")} if run.status == FINISHED else {}
    return Curve(name, state(run), tuple(int(record["epoch"]) for record in epochs), **values, final=final)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _check_epochs(runs: Sequence[Outcome]) -> None:
    if not any(run.network.get("epochs") for run in runs):
        raise OptionError("outcomes", f"{len(runs)} runs", "none has an epoch yet; compute them first")


def _rows(curve: Curve) -> list[Row]:
    numbers: list[tuple[Cell, ...]] = list(
        zip(curve.epochs, curve.loss, curve.test_loss, curve.train_accuracy, curve.test_accuracy)
    )
    return [(curve.name, curve.state, *row) for row in numbers or [(None,) * 5]]


def _label(curve: Curve) -> str:
    return f"{curve.name} ({DIVERGED})" if curve.state.startswith(DIVERGED) else curve.name


def _looks(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Seeds of one kind of run have its colour and markers of their own, else each run has both."""
    parts = [_SEED.search(curve.name) for curve in curves]
    kinds = {name: i for i, name in enumerate(dict.fromkeys(_SEED.sub("", curve.name) for curve in curves))}
    seeds = {name: i for i, name in enumerate(dict.fromkeys(part and part[0] for part in parts))}
    if len(kinds) == 1 or len(seeds) == 1:
        places = [(i, i) for i in range(len(curves))]
    else:
        places = [(kinds[_SEED.sub("", c.name)], seeds[part and part[0]]) for c, part in zip(curves, parts)]
    return [{"color": figures.colour(c), "marker": figures.marker(m)} for c, m in places]


def _plot(
    axes: Axes,
    curve: Curve,
    quantity: str,
    look: Mapping[str, Any],
    line: Any,
    *,
    training: bool = False,
    label: str = "",
) -> None:
    """Training is paler, and without markers, so that it does not hide the test."""
    x, y = curve.points(quantity)
    if not x:
        return
    axes.plot(
        x,
        figures.percent(y) if quantity.endswith("accuracy") else y,
        label=label,
        color=look["color"],
        linestyle=line,
        marker="" if training else look["marker"],
        markevery=max(1, math.ceil(len(x) / _MOST_MARKERS)),
        alpha=figures.FAINT if training else 1,
    )
