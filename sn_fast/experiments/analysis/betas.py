"""The runs of each beta of a network, and the choice between betas by the validation accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..reproduction import Outcome
from ..reproduction.grid import FINISHED
from .results import mean
from .runs import state

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class BetaResult:
    """The runs of one beta.

    Attributes:
        accuracy: {part: {seed: accuracy}}, in [0, 1], under the attack trained with, of the runs that finished.
        unfinished: {seed: what became of the run}, of the others.
    """

    beta: float
    accuracy: dict[str, dict[int, float]]
    unfinished: dict[int, str]

    @property
    def seeds(self) -> set[int]:
        """Of the runs that finished."""
        return set(self.accuracy["test"])

    def values(self, part: str) -> list[float]:
        """Accuracies of the finished runs, or "gap": training less test."""
        if part == "gap":
            return [self.accuracy["train"][seed] - self.accuracy["test"][seed] for seed in self.accuracy["test"]]
        return list(self.accuracy[part].values())

    def mean(self, part: str) -> float | None:
        """Over the finished runs; None if there is none."""
        return mean(self.values(part))


def beta_result(beta: float, runs: Sequence[Outcome]) -> BetaResult:
    """Of runs that differ in the seed alone."""
    finished = {run.config.seed: run for run in runs if run.status == FINISHED}
    accuracy = {
        part: {seed: run.accuracy(part) for seed, run in finished.items() if part in run.final["accuracy"]}
        for part in PARTS
    }
    return BetaResult(beta, accuracy, {run.config.seed: state(run) for run in runs if run.status != FINISHED})


def chosen_beta(results: Sequence[BetaResult]) -> float | None:
    """The beta with the highest validation accuracy; of equals the later. None: nothing allows a choice."""
    candidates = [result for result in results if result.accuracy["validation"]]
    shared = set.intersection(*(set(result.accuracy["validation"]) for result in candidates)) if candidates else set()
    best, highest = None, -math.inf
    for result in candidates if shared else ():
        # Sums in one order: equal accuracies are equal sums.
        value = math.fsum(result.accuracy["validation"][seed] for seed in sorted(shared))
        if value >= highest:
            best, highest = result.beta, value
    return best


def why_no_choice(results: Sequence[BetaResult]) -> str:
    """In words, where ``chosen_beta`` gives None."""
    finished = [result for result in results if result.seeds]
    if not finished:
        return "no run has finished"
    every = ", and every one is shown"
    if not any(result.accuracy["validation"] for result in finished):
        return f"no beta is chosen: there are no validation images{every}"
    return f"no beta is chosen: the betas share no finished seed{every}"
