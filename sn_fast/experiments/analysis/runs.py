"""Runs beside each other: which belong together, what tells them apart, and how they are named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from ...errors import OptionError
from ..figures import beta_label, norm_label
from ..reproduction import Outcome
from ..reproduction.grid import FINISHED
from ..training import TrainConfig

_OF_THE_MACHINE = ("data_dir", "device", "threads", "compile", "tensorboard", "keep_every", "single", "other_eps")


def distinct_runs(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Each run once, in the order given.

    Raises:
        OptionError: there is none.
    """
    runs = list({outcome.config.key(): outcome for outcome in outcomes}.values())
    if not runs:
        raise OptionError("outcomes", runs, "give at least one run")
    return runs


def grouped(runs: Iterable[Outcome], *across: str) -> list[list[Outcome]]:
    """Runs that differ in nothing but the options ``across`` (of "beta", "seed", "train_size", ...)."""
    groups: dict[str, list[Outcome]] = {}
    for run in runs:
        groups.setdefault(representative([run], *across).config.key(), []).append(run)
    return list(groups.values())


def representative(group: Sequence[Outcome], *across: str) -> Outcome:
    """A run that stands for a group in names and titles: in the options ``across`` all groups' are alike."""
    default: dict[str, Any] = {"beta": 1.0, "seed": 0, "train_size": None, "random_labels": 0.0, "scheme": "erm"}
    config = replace(group[0].config, single=True, **{name: default[name] for name in across})
    return replace(group[0], config=config)


def published_order(beta: float) -> tuple[bool, float]:
    """Sorts betas as the published code lists them: inf, then from the smallest up."""
    return math.isfinite(beta), beta


def state(run: Outcome) -> str:
    """What became of a run that has no result: "missing", "training (12 epochs)", "diverged: ...", "failed: ..."."""
    if run.status == FINISHED:
        return FINISHED
    name = {"absent": "missing", "training": f"training ({run.epochs_done} epochs)"}.get(run.status, run.status)
    return f"{name}: {run.reason}" if run.reason else name


def subject(runs: Sequence[Outcome]) -> str:
    """What all runs have in common, for a title: data set, network, scheme."""
    configs = [run.config for run in runs]
    common = [
        text(configs[0])
        for text in (_data, lambda c: c.arch, _scheme)
        if len({text(config) for config in configs}) == 1
    ]
    return ", ".join(common)


def names(runs: Sequence[Outcome]) -> list[str]:
    """A name for each run, of the options in which it differs from others."""
    differing = [text for text in _TEXTS if len({text(run.config) for run in runs}) > 1] or [_TEXTS[-2]]
    found = [", ".join(filter(None, (text(run.config) for text in differing))) for run in runs]
    if len(set(found)) < len(found):  # they differ in an option that has no text of its own
        others = (", ".join(unlike(run.config, runs[0].config)) or "the first" for run in runs)
        found = [f"{name} ({other})" for name, other in zip(found, others)]
    return found


def unlike(config: TrainConfig, other: TrainConfig, *, but: Sequence[str] = ()) -> list[str]:
    """The options in which a run differs from another, as "epochs=3"; without those of the machine and ``but``."""
    return [
        f"{field.name}={_short(getattr(config, field.name))}"
        for field in fields(config)
        if field.name not in (*_OF_THE_MACHINE, *but) and getattr(config, field.name) != getattr(other, field.name)
    ]


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _data(config: TrainConfig) -> str:
    return config.data


def _scheme(config: TrainConfig) -> str:
    ball = f" {norm_label(config.norm)}" if config.scheme in ("fgm", "pgm") and config.norm != "2" else ""
    eps = f" ε = {config.eps:g}" if config.eps is not None and config.scheme != "erm" else ""
    return f"{config.scheme.upper()}{ball}{eps}"


def _labels(config: TrainConfig) -> str:
    share = config.random_labels
    return {0.0: "true labels", 1.0: "random labels"}.get(share, f"{share:.0%} random labels")


def _size(config: TrainConfig) -> str:
    return "all images" if config.train_size is None else f"{config.train_size:,} images"


_TEXTS: tuple[Callable[[TrainConfig], str], ...] = (
    _data,
    lambda config: config.arch,
    _scheme,
    _labels,
    _size,
    lambda config: f"{config.epochs} epochs",
    lambda config: beta_label(config.beta),
    lambda config: f"seed {config.seed}",
)
