"""The paper's accuracy table: the best beta by validation, beside no normalisation and what was published."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import OptionError
from .. import figures
from ..reproduction import Outcome, PublishedRow, published_row_of
from ..reproduction.grid import FINISHED
from ..training import TrainConfig
from .betas import PARTS, BetaResult, beta_result, chosen_beta, why_no_choice
from .results import Analysis, Row, Table, mean, spread
from .runs import distinct_runs, grouped, published_order, unlike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TableRow:
    """One data set, network and scheme.

    Attributes:
        results: one per beta, in the order that decides ties.
        best: the beta that validation chooses; None where it cannot.
        published: the paper's row of this combination, if there is one.
        unlike_published: options in which the runs differ from the published ones; the numbers are then not compared.
    """

    config: TrainConfig
    results: tuple[BetaResult, ...]
    best: float | None
    published: PublishedRow | None
    unlike_published: tuple[str, ...]

    def of(self, beta: float | None) -> BetaResult | None:
        """The runs of one beta."""
        return next((result for result in self.results if result.beta == beta), None)

    @property
    def plain(self) -> BetaResult | None:
        """Without normalisation."""
        return self.of(math.inf)

    @property
    def capped(self) -> BetaResult | None:
        """With the best beta, which may be inf."""
        return self.of(self.best)

    @property
    def shown(self) -> tuple[BetaResult, ...]:
        """The runs of the best beta; of every finite one where none is chosen."""
        if self.best is not None:
            return tuple(result for result in self.results if result.beta == self.best)
        return tuple(result for result in self.results if math.isfinite(result.beta))

    @property
    def shown_caps(self) -> tuple[float, ...]:
        """The finite beta that validation chooses; every one with a finished run where there is no choice."""
        capped = [result for result in self.results if math.isfinite(result.beta) and result.seeds]
        best = chosen_beta(capped)
        return tuple(result.beta for result in capped) if best is None else (best,)

    @property
    def gains(self) -> list[float]:
        """What the best beta adds to the test accuracy, for each seed that both have."""
        return self.gains_of(self.capped)

    def gains_of(self, capped: BetaResult | None) -> list[float]:
        """The same of any beta."""
        plain = self.plain
        if plain is None or capped is None:
            return []
        pairs = [(capped.accuracy["test"][s], plain.accuracy["test"][s]) for s in sorted(plain.seeds & capped.seeds)]
        return [with_cap - without for with_cap, without in pairs]

    @property
    def compared(self) -> PublishedRow | None:
        """The published row, if its numbers can be compared with these."""
        return None if self.unlike_published else self.published

    @property
    def differences(self) -> tuple[float | None, ...]:
        """Test accuracy without normalisation, with the best beta, and gain: less the published ones."""
        published = self.compared
        if published is None:
            return (None,) * 3
        plain, capped = (None if result is None else result.mean("test") for result in (self.plain, self.capped))
        pairs = ((plain, published.plain[2]), (capped, published.capped[2]), (mean(self.gains), published.gain))
        return tuple(None if mine is None else mine - theirs for mine, theirs in pairs)

    @property
    def notes(self) -> list[str]:
        """What of the row is missing, and why nothing is compared."""
        found = [
            f"{figures.beta_label(result.beta)}, {_seeds(seeds)}: {what}"
            for result in self.results
            for what, seeds in _by_fate(result.unfinished).items()
        ]
        if self.best is None:
            found.append(why_no_choice(self.results))
        if self.published is not None and self.unlike_published:
            found.append(f"not compared with the published row: {', '.join(self.unlike_published)}")
        return found

    def label(self) -> str:
        """Network and scheme, for a figure."""
        config = self.config
        ball = f" {figures.norm_label(config.norm)}" if config.norm != "2" and config.scheme in ("fgm", "pgm") else ""
        arithmetic = " (published arithmetic)" if config.reference else ""
        return f"{config.data} {config.arch.removesuffix('_sn')} {config.scheme.upper()}{ball}{arithmetic}"


@dataclass(frozen=True)
class AccuracyTable(Analysis):
    """Accuracies under the attack trained with, with the best beta and without any; see ``accuracy_table``."""

    table: tuple[TableRow, ...]

    columns = (
        *("data", "arch", "scheme", "norm", "eps", "seeds"),
        *(f"no SN {part}" for part in (*PARTS, "gap")),
        "no SN test spread",
        "best beta",
        *(f"best {part}" for part in (*PARTS, "gap")),
        *("best test spread", "test gain", "test gain spread"),
        *("published no SN test", "published best beta", "published best test", "published test gain"),
        *("no SN test difference", "best test difference", "test gain difference"),
        "notes",
    )

    def rows(self) -> list[Row]:
        """One per combination: means over the finished seeds, sample standard deviations as spreads."""
        return [_summary(row) for row in self.table]

    def tables(self) -> dict[str, Table]:
        """The rows, and "betas": each beta and seed by itself."""
        return {**super().tables(), "betas": Table(_RUN_COLUMNS, [run for row in self.table for run in _runs(row)])}

    def text(self) -> str:
        """For a terminal: one line per combination in %, or one per beta where none is chosen; notes below."""
        rows = [line for row in self.table for line in _lines(row)]
        columns = ("accuracy (%)", "no SN: train", "test", "gap", "best β", "train", "test", "gap", "gain")
        published = ("published: no SN", "best β", "test", "gain", "difference: no SN", "best β", "gain")
        return "\n".join([Table(columns + published, rows).text(), *self.notes()])

    def notes(self) -> list[str]:
        """Those of the rows, each with the row's label."""
        return [f"{row.label()}: {note}" for row in self.table for note in row.notes]

    def _draw(self) -> Figure:
        figure = figures.new_figure(7.6, 1.9 + 0.42 * len(self.table))
        axes = figure.subplots()
        unchosen = {result.beta for row in self.table if row.best is None for result in row.shown if result.seeds}
        looks = {beta: i for i, beta in enumerate(sorted(unchosen), 2)}  # 0 and 1: no SN, and the best
        for y, row in enumerate(self.table):
            _draw_row(axes, y, row, looks)
        axes.set_yticks(range(len(self.table)), [_tick(row) for row in self.table])
        axes.set(ylim=(len(self.table) - 0.4, -0.6), xlabel="test accuracy under the attack trained with (%)")
        axes.grid(axis="y", visible=False)
        every = " (every β where there is no choice)" if unchosen else ""
        figures.titled(figure, f"Test accuracy without SN and with the best β by validation{every}")
        figures.legend_below(figure, [axes])
        return figure


def accuracy_table(outcomes: Iterable[Outcome], *, betas: Sequence[float] | None = None) -> AccuracyTable:
    """The accuracy table of a grid of runs, with the choice of beta by the validation accuracy.

    Runs that differ in nothing but beta and seed make one row. A beta's accuracy is the mean over its finished runs;
    those that diverged, failed or are missing are named in the notes. Betas are compared on the seeds that each beta
    with a finished run has; of equal accuracies the later in ``betas`` is chosen, and inf is a candidate, as published.
    Without validation images nothing is chosen, the test images choose nothing: every beta is shown, with a note.

    Args:
        outcomes: of ``Store.outcomes``; their order does not matter, that of the first of each row is kept.
        betas: the order that decides ties. None: inf, then from the smallest up, as in the published code.

    Raises:
        OptionError: there is no run, or one with a beta that is not in ``betas``.
    """
    runs = distinct_runs(outcomes)
    return AccuracyTable(tuple(_table_row(group, betas) for group in grouped(runs, "beta", "seed")))


def _table_row(runs: list[Outcome], order: Sequence[float] | None) -> TableRow:
    found = {run.config.beta for run in runs}
    if order is not None and (unknown := found - set(order)):
        raise OptionError("betas", list(order), f"there is a run with beta={min(unknown):g}; add it")
    betas = sorted(found, key=published_order) if order is None else [beta for beta in order if beta in found]
    results = tuple(beta_result(beta, [run for run in runs if run.config.beta == beta]) for beta in betas)
    config = runs[0].config
    published = published_row_of(config)
    return TableRow(config, results, chosen_beta(results), published, tuple(_unlike_published(config)))


def _by_fate(unfinished: Mapping[int, str]) -> dict[str, list[int]]:
    """The seeds of each fate."""
    return {what: sorted(s for s in unfinished if unfinished[s] == what) for what in dict.fromkeys(unfinished.values())}


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _unlike_published(config: TrainConfig) -> list[str]:
    """In what a run is not as published, seeds and betas aside."""
    default = TrainConfig.create(
        data=config.data, arch=config.arch, scheme=config.scheme, norm=config.norm, beta=config.beta, single=True
    )
    # ERM has no strength, and the published row was found by the radius where that is not of l2. Once the images are
    # known (other_eps is filled in then too), strengths can no longer be told from given ones.
    by_radius = config.scheme == "erm" or (config.scheme != "wrm" and config.norm != "2")
    strength = ("eps",) if by_radius or config.other_eps is not None else ()
    # Both arithmetics are compared: the published one, and the one that does not underflow.
    return unlike(config, default, but=("beta", "seed", "reference", *strength))


_RUN_COLUMNS = ("data", "arch", "scheme", "norm", "eps", "beta", "seed", "status", *PARTS, "gap", "best")


def _runs(row: TableRow) -> list[Row]:
    runs: list[Row] = []
    for result in row.results:
        for seed in sorted(result.seeds | set(result.unfinished)):
            accuracies = [result.accuracy[part].get(seed) for part in PARTS]
            train, _, test = accuracies
            gap = None if train is None or test is None else train - test
            status = result.unfinished.get(seed, FINISHED)
            runs.append((*_key(row), result.beta, seed, status, *accuracies, gap, int(result.beta == row.best)))
    return runs


def _key(row: TableRow) -> Row:
    config = row.config
    return config.data, config.arch, config.scheme, config.norm, config.eps


def _summary(row: TableRow) -> Row:
    seeds = sorted(set().union(*(result.seeds for result in row.results)))
    published = row.published
    theirs = (published.plain[2], published.beta, published.capped[2], published.gain) if published else (None,) * 4
    return (
        *_key(row),
        " ".join(map(str, seeds)),
        *_means(row.plain),
        row.best,
        *_means(row.capped),
        mean(row.gains),
        spread(row.gains),
        *theirs,
        *row.differences,
        "; ".join(row.notes),
    )


def _means(result: BetaResult | None) -> Row:
    if result is None:
        return (None,) * 5
    return (*(result.mean(part) for part in (*PARTS, "gap")), spread(result.values("test")))


def _lines(row: TableRow) -> list[Row]:
    """Of the text: the row, and each beta below it where none is chosen."""
    parts = ("train", "test", "gap")
    lines: list[Row] = [
        (
            row.label(),
            *(_percent_text(row.plain, part) for part in parts),
            "none" if row.best is None else f"{row.best:g}",
            *(_percent_text(row.capped, part) for part in parts),
            _signed(mean(row.gains)),
            *_published_text(row),
        )
    ]
    for result in row.shown if row.best is None else ():
        numbers = (*(_percent_text(result, part) for part in parts), _signed(mean(row.gains_of(result))))
        lines.append((f"  with {figures.beta_label(result.beta)}", *("",) * 4, *numbers, *("",) * 7))
    return lines


def _percent_text(result: BetaResult | None, part: str) -> str:
    """ "95.93", "95.93 ± 0.12" over seeds, or what became of the runs."""
    if result is None:
        return "-"
    values = result.values(part)
    lost = [what.partition(":")[0] for what in result.unfinished.values()]
    if not values:
        return "/".join(dict.fromkeys(lost)) or "-"
    deviation = spread(values)
    text = f"{100 * math.fsum(values) / len(values):.2f}"
    text += "" if deviation is None or part == "train" else f" ± {100 * deviation:.2f}"
    return f"{text} ({len(lost)} lost)" if lost else text


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.2f}"


def _published_text(row: TableRow) -> tuple[str, ...]:
    published = row.published
    if published is None:
        return ("-",) * 7
    theirs = f"{100 * published.plain[2]:.2f}", f"{published.beta:g}", f"{100 * published.capped[2]:.2f}"
    return (*theirs, _signed(published.gain), *map(_signed, row.differences))


def _tick(row: TableRow) -> str:
    chosen = "no choice" if row.best is None else f"β = {row.best:g}".replace("inf", "∞")
    return f"{row.label()} ({chosen})"


def _draw_row(axes: Axes, y: int, row: TableRow, looks: Mapping[float, int]) -> None:
    """``looks``: the numbers of the series of betas that are not chosen."""
    ends = []
    chosen = row.best is not None
    capped = [(r, 1, "best β") if chosen else (r, looks.get(r.beta, 1), figures.beta_label(r.beta)) for r in row.shown]
    for result, index, name in ((row.plain, 0, "no SN"), *capped):
        values = [] if result is None else result.values("test")
        if not values:
            continue
        centre = 100 * math.fsum(values) / len(values)
        ends.append(centre)
        colour, shape = figures.colour(index), figures.marker(index)
        axes.plot(centre, y, shape, color=colour, markersize=7, label=name, zorder=3)
        if deviation := spread(values):
            axes.errorbar(centre, y, xerr=100 * deviation, fmt="none", ecolor=colour, capsize=3)
    if len(ends) > 1:
        axes.plot([min(ends), max(ends)], [y, y], color="0.6", linewidth=1.2, zorder=1)
    if row.compared is not None:
        for value, index, name in ((row.compared.plain[2], 0, "no SN"), (row.compared.capped[2], 1, "best β")):
            shape = figures.MARKERS[index]
            label = f"{name}, published"
            axes.plot(100 * value, y + 0.25, shape, color=figures.colour(index), markerfacecolor="none", label=label)
    if not ends:
        axes.text(0.5, y, "no run has finished", transform=axes.get_yaxis_transform(), ha="center", va="center")
