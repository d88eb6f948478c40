"""The options of the job: their defaults, their checks, and their form in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...errors import UserError
from ...running import MOST_THREADS
from .adversary import Adversary

SCHEMES = ("erm", "fgm", "pgm", "wrm")
NORMS = ("2", "inf", "1")
ATTACK_LABELS = ("true", "predicted")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class _DataDefaults:
    train_size: int
    epochs: int
    radius: Mapping[str, float]
    """eps of FGM and PGM, by norm."""
    transport: float
    """eps = 1 / (2 gamma) of WRM."""
    beta: float


DEFAULTS = {
    "digits": _DataDefaults(200, 180, {"2": 0.8, "inf": 0.15, "1": 4.0}, 0.3, 1.6),
    "mnist5k": _DataDefaults(500, 40, {"2": 1.5, "inf": 0.15, "1": 15.0}, 1.0, 2.0),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes; ``create`` fills in what depends on the data set.

    Raises:
        UserError: an option is out of range.
    """

    data: str = "digits"
    train_size: int
    scheme: str = "pgm"
    norm: str = "2"
    """Of the radius of FGM and PGM; WRM has none."""
    eps: float
    """Radius of FGM and PGM, in pixels in [0, 1]; 1 / (2 gamma) of WRM. Under "erm" it serves the evaluation only."""
    steps: int = 15
    attack_labels: str = "true"
    """What training's attacks move away from: "true" labels, or as the published code the "predicted" ones."""
    beta: float
    single: bool = False
    """Train the network with ``beta`` alone, without the one of beta = inf beside it."""
    epochs: int
    batch_size: int = 50
    lr: float = 0.05
    seed: int = 0
    device: str
    threads: int = 1
    """Of PyTorch on the CPU. The layers are too small to gain much from a second thread, and where others compute too,
    threads that wait for each other made the job ten times slower (measured)."""

    @classmethod
    def create(cls, **options: Any) -> TrainConfig:
        """A configuration from some options by name; None or absent: the default, which may depend on the data set."""
        given = {name: value for name, value in options.items() if value is not None}
        given["norm"] = str(given.get("norm", cls.norm))  # 2 and inf may come as numbers
        data, scheme, norm = given.get("data", cls.data), given.get("scheme", cls.scheme), given["norm"]
        _check_choice("data", data, tuple(DEFAULTS))
        _check_choice("norm", norm, NORMS)
        default = DEFAULTS[data]
        by_data = {
            "train_size": default.train_size,
            "eps": default.transport if scheme == "wrm" else default.radius[norm],
            "beta": default.beta,
            "epochs": default.epochs,
        }
        return cls(**{**by_data, **given, "device": _resolved_device(given.get("device", "auto"))})

    def __post_init__(self) -> None:
        _check_choice("data", self.data, tuple(DEFAULTS))
        _check_choice("scheme", self.scheme, SCHEMES)
        _check_choice("norm", self.norm, NORMS)
        _check_choice("attack_labels", self.attack_labels, ATTACK_LABELS)
        for name in ("eps", "lr"):
            _check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "give a finite number > 0")
        for name in ("train_size", "steps", "epochs", "batch_size", "threads"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "give an integer >= 1")
        for name in ("train_size", "steps", "epochs", "batch_size"):
            _check(name, getattr(self, name), getattr(self, name) < 2**31, "give an integer < 2147483648")
        _check("threads", self.threads, self.threads <= MOST_THREADS, f"give an integer <= {MOST_THREADS}")
        _check("seed", self.seed, 0 <= self.seed < 2**32, "give an integer from 0 to 4294967295")
        _check("beta", self.beta, self.beta > 0, "give a number > 0")
        comparable = self.single or self.beta < math.inf
        _check("beta", self.beta, comparable, "the comparison is with inf; give a finite number, or add --single")

    @property
    def betas(self) -> tuple[float, ...]:
        """One per network to train."""
        return (self.beta,) if self.single else (math.inf, self.beta)

    @property
    def training_adversary(self) -> Adversary:
        return self.adversary(self.scheme)

    def adversary(self, scheme: str) -> Adversary:
        """The attack ``scheme``, at this run's eps where it is an eps of that kind, else at the data set's default."""
        default = DEFAULTS[self.data]
        if scheme == "wrm":
            eps = self.eps if self.scheme == "wrm" else default.transport
        else:
            eps = default.radius[self.norm] if self.scheme == "wrm" else self.eps
        return Adversary(scheme, self.norm, eps, self.steps)

    def to_json(self) -> dict[str, Any]:
        """As a file holds it; JSON has no infinity."""
        return {**asdict(self), "beta": json_number(self.beta)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        return cls(**{**values, "beta": float(values["beta"])})

    def refuse_changes(self, options: Mapping[str, Any]) -> None:
        """Raise UserError if an option that is not None differs from this configuration."""
        for name, value in options.items():
            mine = getattr(self, name)
            same = value is None or value == mine or (name == "device" and value == "auto")
            _check(name, value, same, f"the run to resume has {mine}; leave the option out, or start a new run")


def json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _resolved_device(device: str) -> str:
    _check_choice("device", device, DEVICES)
    available = torch.cuda.is_available()
    _check("device", device, available or device != "cuda", "this PyTorch sees no CUDA device; give --device cpu")
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _check(name, value, value in choices, f"choose {', '.join(choices[:-1])} or {choices[-1]}")


def _check(name: str, value: object, valid: bool, remedy: str) -> None:
    if not valid:
        raise UserError(f"argument --{name.replace('_', '-')}: {value} will not do: {remedy}")
