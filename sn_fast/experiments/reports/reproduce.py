"""Parts of the paper, each the runs that it needs and the analyses of them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import OptionError, UserError
from ...files import replace_file
from ...running import progress_bar, torch_threads
from ..analysis import (
    AccuracyTable,
    Analysis,
    accuracy_table,
    by_defence,
    capacities,
    gradient_norm_distributions,
    margin_distributions,
    norm_gain_distributions,
    perturbed_images,
    random_label_fitting,
    robustness_curves,
    trained_norms,
    training_curves,
    write_analysis,
)
from ..analysis.betas import why_no_choice
from ..data import Samples, Split, load_data
from ..reproduction import Grid, Outcome, Store, compute
from ..reproduction.grid import FINISHED
from ..training import TrainConfig, TrainedNetwork, trained_networks
from ..training.adversary import Adversary
from ..training.config import json_number

PARTS = ("table", "curves", "margins", "random-labels", "norms", "bounds")
STORE = "runs"
"""Folder of the runs, below that of the report."""
_FIGURES = "figures"
_STATISTICS_IMAGES = 2000
"""Training images for margins, gradients and capacities: enough for quantiles."""
_MARGIN_MODES = {"erm": 1, "fgm": 2, "pgm": 2, "wrm": 1}
"""Of the normalised margins, by the attack trained with, as published; for WRM nothing was."""


@dataclass
class Report:
    """What was computed, as text, as JSON and as files.

    Attributes:
        parts: those asked for.
        outcomes: of all runs, computed or not.
        analyses: by name, in the order of the report.
        missing: {name of an analysis: why there is none}.
        notes: what a reader must know of the choices behind the figures.
    """

    title: str
    parts: tuple[str, ...]
    outcomes: list[Outcome]
    analyses: dict[str, Analysis] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def unfinished(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status != FINISHED]

    def text(self) -> str:
        """The table, and what is missing."""
        lines = [self.title, ""]
        table = self.analyses.get("accuracy")
        if isinstance(table, AccuracyTable):
            lines += [table.text(), ""]
        lines += [f"{outcome.config.key()}: {outcome.status} {outcome.reason}".rstrip() for outcome in self.unfinished]
        lines += [f"no {name}: {reason}" for name, reason in self.missing.items()]
        lines += self.notes
        return "\n".join(lines).rstrip()

    def document(self) -> dict[str, Any]:
        """The report as one JSON document."""
        return {
            "title": self.title,
            "parts": list(self.parts),
            "runs": [
                {"run": o.config.key(), "status": o.status, "epochs": o.epochs_done, "reason": o.reason}
                for o in self.outcomes
            ],
            "analyses": {
                name: {
                    suffix or "rows": {
                        "columns": list(table.columns),
                        "rows": [[_json(cell) for cell in row] for row in table.rows],
                    }
                    for suffix, table in analysis.tables().items()
                }
                for name, analysis in self.analyses.items()
            },
            "missing": self.missing,
            "notes": [*(note for analysis in self.analyses.values() for note in analysis.notes()), *self.notes],
        }

    def write(self, folder: Path, page: Callable[[Report], str]) -> list[Path]:
        """report.txt, report.json, report.html and the figures with their numbers.

        Raises:
            UserError: a file cannot be written.
        """
        paths = []
        for name, analysis in self.analyses.items():
            paths += write_analysis(analysis, folder / _FIGURES, name)
        contents = {
            "report.txt": self.text() + "\n",
            "report.json": json.dumps(self.document(), indent=1, allow_nan=False) + "\n",
            "report.html": page(self),
        }
        for name, content in contents.items():
            path = folder / name
            try:
                replace_file(path, content.encode())
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror or error}; free some space") from None
            paths.append(path)
        return paths


def reproduce(
    parts: Sequence[str],
    grid: Grid,
    folder: str | os.PathLike[str],
    *,
    jobs: int = 1,
    progress: bool = False,
    only_report: bool = False,
    retry_failed: bool = False,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> Report:
    """Compute what is missing of a grid of runs, and analyse it. Runs are kept in ``folder``/runs.

    Args:
        parts: of ``PARTS``: "table" (accuracy over beta beside the published), "curves" (robustness in l2 and l_inf,
            and training), "margins" (margins, gradient norms, norm gain, perturbed images), "random-labels" (runs of
            their own with random labels), "norms" (of the layers), "bounds" (capacities beside the measured gaps).
        only_report: compute nothing; report what there is.
        jobs, progress, retry_failed, report: as of ``compute``.

    Raises:
        OptionError: a part is unknown, or the grid is impossible. UserError: a file is damaged or cannot be written.
    """
    for part in parts:
        if part not in PARTS:
            raise OptionError("parts", part, f"choose {', '.join(PARTS)} or all")
    store = Store(Path(folder, STORE))
    if Path(folder).exists() and not Path(folder).is_dir():
        raise OptionError("folder", str(folder), "is a file; give a folder")
    runs = grid.runs()
    random_runs = random_label_runs(grid) if "random-labels" in parts else []
    wanted = [*runs, *random_runs]
    if not only_report:
        images = len(load_data(runs[0].data, **runs[0].data_options()).train)  # fails here rather than in every run
        for config in wanted:
            config.check_training_images(images)
        _make(store.path, folder)
        compute(store, wanted, jobs=jobs, progress=progress, retry_failed=retry_failed, report=report)
    outcomes = [store.outcome(config) for config in wanted]
    result = Report(_title(grid), tuple(parts), outcomes)
    with progress_bar(progress, "analysing", len(parts)) as bar:
        _Analyst(result, store, runs, random_runs).analyse(bar)
    return result


def _make(path: Path, folder: str | os.PathLike[str]) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError("folder", str(folder), f"cannot be made ({error.strerror}); give another") from None


def random_label_runs(grid: Grid) -> list[TrainConfig]:
    """The grid with random labels of all training images; other options as they are."""
    return replace(grid, options={**grid.options, "random_labels": 1.0}).runs()


class _Analyst:
    """Makes the analyses of a report, each for itself: one that is not possible is named with its reason."""

    def __init__(
        self, report: Report, store: Store, runs: Sequence[TrainConfig], random_runs: Sequence[TrainConfig]
    ) -> None:
        self.report = report
        self.store = store
        self.outcomes = [store.outcome(config) for config in runs]
        self.random = [store.outcome(config) for config in random_runs]
        self._split: tuple[str, Split] | None = None

    def analyse(self, bar: Any) -> None:
        for part in self.report.parts:
            bar.set_description_str(f"analysing: {part}")
            try:
                getattr(self, f"_{part.replace('-', '_')}")()
            except UserError as error:  # the data, say
                self.report.missing[part] = str(error)
            bar.update(1)

    def _table(self) -> None:
        self._add("accuracy", accuracy_table, self.outcomes)

    def _curves(self) -> None:
        panels: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            arch = outcome.config.arch.removesuffix("_sn")
            panels.setdefault(f"training-{arch}-{outcome.config.scheme}", []).append(outcome)
        for name, outcomes in panels.items():
            self._add(name, training_curves, outcomes)
        for arch, members in self._chosen().items():
            networks = by_defence(network for _, network in members)
            configs = [network.config for _, network in members]
            for norm in dict.fromkeys(("2", "inf", *(config.norm for config in configs))):
                name = f"robustness-{arch}" if norm == "2" else f"robustness-{arch}-l{norm}"
                self._add(name, robustness_curves, networks, self.split.test, self._attacks(configs, norm))

    def _margins(self) -> None:
        samples = self._statistics_samples(self.outcomes[0])
        for arch, members in self._chosen().items():
            networks = by_defence(network for _, network in members)
            adversaries = {
                panel: next(n.config.training_adversary for _, n in members if n.model in of_panel.values())
                for panel, of_panel in networks.items()
            }
            with_samples = {
                panel: {name: (model, samples) for name, model in of_panel.items()}
                for panel, of_panel in networks.items()
            }
            modes = {panel: (0, _MARGIN_MODES[adversary.scheme]) for panel, adversary in adversaries.items()}
            self._add(f"margins-{arch}", partial(margin_distributions, modes=modes), with_samples, adversaries)
            self._add(f"gradients-{arch}", gradient_norm_distributions, networks, samples)
            self._add(f"gain-{arch}", norm_gain_distributions, networks, samples)
            for panel, of_panel in networks.items():
                if (adversary := adversaries[panel]).scheme != "erm":
                    name = f"images-{arch}-{adversary.scheme}"
                    self._add(name, perturbed_images, of_panel, self.split.test, adversary)

    def _random_labels(self) -> None:
        self._add("random-labels", random_label_fitting, [*self.outcomes, *self.random])

    def _norms(self) -> None:
        self._add("norms", trained_norms, self.outcomes)

    def _bounds(self) -> None:
        finished = [outcome for outcome in self.outcomes if outcome.status == FINISHED]
        networks = [(outcome, self._network(outcome)) for outcome in finished]
        members = [(outcome, network) for outcome, network in networks if network is not None]
        self._add("capacities", capacities, members, self._statistics_samples)

    def _add(self, name: str, make: Callable[..., Analysis], *arguments: Any) -> None:
        try:
            with torch_threads(1):
                self.report.analyses[name] = make(*arguments)
        except UserError as error:
            self.report.missing[name] = str(error)

    def _attacks(self, configs: Sequence[TrainConfig], norm: Any) -> dict[str, Adversary]:
        """FGM and PGM at the radius trained with in this norm, or at the data set's default; WRM, of no norm, at l2."""
        default = replace(configs[0], scheme="fgm", norm=norm, eps=None, other_eps=None)
        trained = (c for c in configs if c.scheme in ("fgm", "pgm") and c.norm == norm)
        config = next(trained, default.with_strength(self.split.mean_norm))
        return {
            scheme.upper(): config.adversary(scheme) for scheme in ("fgm", "pgm", *(["wrm"] if norm == "2" else []))
        }

    @property
    def split(self) -> Split:
        """The data of the runs of the first seed."""
        return self._split_of(self.outcomes[0].config)

    def _split_of(self, config: TrainConfig) -> Split:
        """The data of a run; those of the last one asked for are kept."""
        options = config.data_options()
        key = repr((config.data, options))
        if self._split is None or self._split[0] != key:
            self._split = key, load_data(config.data, **options)
        return self._split[1]

    def _statistics_samples(self, outcome: Outcome) -> Samples:
        """Images that the run was trained on: subsets are drawn by the seed."""
        train = self._split_of(outcome.config).train
        return Samples(train.x[:_STATISTICS_IMAGES], train.y[:_STATISTICS_IMAGES])

    def _network(self, outcome: Outcome) -> TrainedNetwork | None:
        """The network of a run; None if the store holds its numbers alone."""
        try:
            (network,) = trained_networks(self.store.folder(outcome.config)).values()
        except UserError as error:
            self.report.missing[f"network of {outcome.config.key()}"] = str(error)
            return None
        return network

    def _chosen(self) -> dict[str, list[tuple[Outcome, TrainedNetwork]]]:
        """By network: of each scheme the run without normalisation and the best one with, of the first seed.

        The best by validation, over all seeds, as in the table; without validation images all of them, and a note.
        """
        chosen: dict[str, list[tuple[Outcome, TrainedNetwork]]] = {}
        first = self.outcomes[0].config.seed
        was_choice = False
        for row in accuracy_table(self.outcomes).table:
            caps = row.shown_caps
            was_choice |= len(caps) == 1 and sum(math.isfinite(r.beta) and bool(r.seeds) for r in row.results) > 1
            if len(caps) > 1:
                results = [result for result in row.results if result.beta in caps]
                self._note(f"{row.label()}, figures of networks: {why_no_choice(results)}")
            for outcome in self.outcomes:
                config = outcome.config
                of_row = (config.arch, config.scheme) == (row.config.arch, row.config.scheme)
                shown = math.isinf(config.beta) or config.beta in caps
                if not (of_row and shown and config.seed == first and outcome.status == FINISHED):
                    continue
                network = self._network(outcome)
                if network is not None:
                    chosen.setdefault(config.arch.removesuffix("_sn"), []).append((outcome, network))
        if not chosen:
            self.report.missing["networks"] = f"no run of seed {first} has finished"
        elif was_choice:
            self._note(
                f"Figures of networks (curves, margins, gradients, gain, images) show seed {first}: no SN, and "
                "the finite beta with the best validation accuracy over all seeds."
            )
        return chosen

    def _note(self, note: str) -> None:
        if note not in self.report.notes:
            self.report.notes.append(note)


def _title(grid: Grid) -> str:
    betas = grid.betas if isinstance(grid.betas, str) else ", ".join(f"{beta:g}" for beta in grid.betas)
    return (
        f"{grid.data}: {', '.join(grid.archs)}; {', '.join(s.upper() for s in grid.schemes)}; beta {betas}; "
        f"seeds {', '.join(map(str, grid.seeds))}"
    )


def _json(cell: Any) -> Any:
    return json_number(cell) if isinstance(cell, float) else cell
