"""A grid of runs: which combinations, in which order, and the store that holds what they gave."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import OptionError, UserError, first_line
from ...files import replace_file
from ..networks import network_names
from ..training import TrainConfig
from ..training.config import SCHEMES
from .published import published_row_of

FINISHED = "finished"
DIVERGED = "diverged"
# The first test images, of the sets whose validation is empty by default.
_VALIDATION_SIZES = {"digits": 300, "mnist5k": 500}
PUBLISHED = "published"
"""For ``betas``: inf, and the best beta of the published row."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Every combination of the options below, each a network trained for itself.

    Attributes:
        data, norm, eps: as of ``TrainConfig``; eps None: the published strength.
        archs: names without "_sn", of which the normalised twin is trained; beta = inf is the plain network.
        schemes: of "erm", "fgm", "pgm", "wrm".
        betas: caps; or ``PUBLISHED``.
        seeds: of weights and batches.
        options: further options of every run, by name.
    """

    data: str = "mnist"
    norm: str = "2"
    eps: float | None = None
    archs: Sequence[str] = ("mlp1_relu",)
    schemes: Sequence[str] = ("erm", "fgm", "pgm", "wrm")
    betas: Sequence[float] | str = (math.inf, 4.0, 2.0, 1.0)
    seeds: Sequence[int] = (0,)
    options: Mapping[str, Any] = field(default_factory=dict)

    def runs(self) -> list[TrainConfig]:
        """All runs: by seed, scheme, network and beta, so that early results say most.

        Raises:
            OptionError: a value is out of range, there is none, or nothing was published for ``betas``.
        """
        for name in ("archs", "schemes", "betas", "seeds"):
            if not len(getattr(self, name)):
                raise OptionError(name, getattr(self, name), "give at least one")
        if self.eps is not None and not 0 < self.eps < math.inf:  # also where no scheme has a radius
            raise OptionError("eps", self.eps, "must be a finite number > 0")
        return [
            self.run(arch, scheme, beta, seed)
            for seed, scheme, arch in itertools.product(self.seeds, self.schemes, self.archs)
            for beta in self.betas_of(arch, scheme)
        ]

    def run(self, arch: str, scheme: str, beta: float, seed: int) -> TrainConfig:
        """The run of one combination."""
        eps = None if scheme in ("erm", "wrm") else self.eps
        norm = "2" if scheme in ("erm", "wrm") else self.norm
        return TrainConfig.create(
            **{
                "evaluation": "published",
                "validation_size": _VALIDATION_SIZES.get(self.data),
                **self.options,
                "data": self.data,
                "arch": normalized_twin(arch),
                "scheme": scheme,
                "norm": norm,
                "eps": eps,
                "beta": beta,
                "seed": seed,
                "single": True,
            }
        )

    def betas_of(self, arch: str, scheme: str) -> list[float]:
        """The caps to train with, inf first."""
        if not isinstance(self.betas, str):
            return sorted(set(self.betas), reverse=True)
        if self.betas != PUBLISHED:
            raise OptionError("betas", self.betas, f"give numbers, or {PUBLISHED}")
        config = self.run(arch, scheme, math.inf, 0)
        row = published_row_of(config)
        if row is None:
            ball = "" if config.norm == "2" else f", norm {config.norm}, eps {config.eps or 'by default'}"
            raise OptionError(
                "betas", PUBLISHED, f"there is no published row of {self.data}, {arch}, {scheme}{ball}; give numbers"
            )
        return sorted({math.inf, row.beta}, reverse=True)


def normalized_twin(arch: str) -> str:
    """``arch`` with its layers normalised: the network that the published tables train for every beta, inf included."""
    name = arch if arch.endswith("_sn") else f"{arch}_sn"
    return name if name in network_names() else arch


def _order(outcome: Outcome) -> tuple[Any, ...]:
    config = outcome.config
    return config.data, config.arch, SCHEMES.index(config.scheme), config.reference, -config.beta, config.seed


def _as_asked(config: TrainConfig, key: str) -> TrainConfig:
    """The configuration before the images were known, whose ``key`` names the run's folder: a run's file holds the
    strengths in place of the defaults. As it is, if the folder has another name."""
    strengths = itertools.product((config.eps, None), (config.other_eps, None))
    asked = (replace(config, eps=eps, other_eps=other) for eps, other in strengths)
    return next((candidate for candidate in asked if candidate.key() == key), config)


@dataclass(frozen=True)
class Outcome:
    """What the store knows of a run."""

    config: TrainConfig
    status: str
    """"absent", "training", "finished", "diverged" or "failed"."""
    epochs_done: int = 0
    network: Mapping[str, Any] = field(default_factory=dict)
    """The network's part of metrics.json."""
    reason: str = ""

    @property
    def final(self) -> Mapping[str, Any]:
        """Accuracies and norms after training; only of a finished run."""
        found: Mapping[str, Any] = self.network["final"]
        return found

    def accuracy(self, part: str) -> float:
        """Under the attack trained with; clean of ERM."""
        column = "clean" if self.config.scheme == "erm" else self.config.scheme
        return float(self.final["accuracy"][part][column])


class Store:
    """Runs in folders below one, by ``TrainConfig.key``: a run that is there is not computed again."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def folder(self, config: TrainConfig) -> Path:
        return self.path / config.key()

    def outcome(self, config: TrainConfig) -> Outcome:
        """What there is of a run, which another process may be computing.

        Raises:
            UserError: its files are damaged.
        """
        return self._outcome(config, self.folder(config))

    def everything(self) -> list[Outcome]:
        """What there is of every run, whichever grid it is of, by data, network, scheme, arithmetic and beta.

        Raises:
            UserError: a file is damaged.
        """
        found = []
        for folder in sorted(path for path in self.path.iterdir() if path.is_dir()):
            document = self._read(folder / "config.json")
            if document is not None:
                found.append(self._outcome(_as_asked(TrainConfig.from_json(document), folder.name), folder))
        return sorted(found, key=_order)

    def _outcome(self, config: TrainConfig, folder: Path) -> Outcome:
        failure = self._read(folder / "failed.json")
        metrics = self._read(folder / "metrics.json")
        if metrics is None:
            return Outcome(config, "absent") if failure is None else Outcome(config, "failed", reason=failure["reason"])
        networks = list(metrics["networks"].values())
        status = "failed" if failure is not None and metrics["status"] == "training" else metrics["status"]
        reason = (failure or metrics).get("reason", "")
        return Outcome(config, status, metrics["epochs_done"], networks[0], reason)

    def outcomes(self, grid: Grid) -> Iterator[Outcome]:
        return (self.outcome(config) for config in grid.runs())

    def export(self, config: TrainConfig, other: Store) -> None:
        """Copy the configuration and the numbers of a run, not its network, and nothing that names this machine.

        Raises:
            UserError: it cannot be written.
        """
        for name in ("config.json", "metrics.json"):
            document = self._read(self.folder(config) / name)
            if document is None:
                continue
            if name == "config.json":
                document["data_dir"] = None
            path = other.folder(config) / name
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, (json.dumps(document, allow_nan=False) + "\n").encode())
            except OSError as error:
                raise UserError(f"cannot write {path}: {error.strerror or error}; give another folder") from None

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            document: dict[str, Any] = json.loads(path.read_bytes())
            return document
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({first_line(error)}); delete its folder to compute the run again"
            ) from None
