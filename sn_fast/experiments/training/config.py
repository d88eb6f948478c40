"""The options of a run: their checks, and their form in a file."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ...errors import OptionError
from ...running import MOST_THREADS
from ..data import data_set_names, published_options
from ..data.load import SPLITS
from ..data.registry import find_data_set
from ..networks import network_names, normalized_layers
from .adversary import Adversary
from .defaults import defaults_of
from .option_types import plain

SCHEMES = ("erm", "fgm", "pgm", "wrm")
NORMS = ("2", "inf", "1")
ATTACK_LABELS = ("true", "predicted")
DEVICES = ("auto", "cpu", "cuda")
OPTIMIZERS = ("sgd", "adam")
DECAYS = ("none", "epoch", "step")
GRADIENTS = ("detached", "full")
NORMALIZATIONS = ("parametrization", "projection")
EVALUATIONS = ("curves", "published")
PRECISIONS = ("float32", "bfloat16")
_NORM_NAMES = {"l2": "2", "linf": "inf", "l1": "1"}
_SCHEME_NAMES = {"pgd": "pgm"}
_DECAY = 0.95
_DECAY_PERIOD = 390  # steps of an epoch of CIFAR-10
_STOP_EPOCHS = 5


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes; ``create`` fills in what depends on the data set.

    Raises:
        OptionError: an option is out of range.
    """

    data: str = "digits"
    data_dir: str | None = None
    """Folder of the data set's official files; of no use to those that come with packages (digits, mnist5k)."""
    allow_partial: bool = False
    """Accept files that are not the official ones whole."""
    train_size: int | None = None
    """None: all training images."""
    test_size: int | None = None
    """None: all test images."""
    validation_size: int | None = None
    """Number of images for choices between networks. None: as published; 0 of the sets that come with packages."""
    split: str = "published"
    """Which images are for training, validation and test; see ``load_data``."""
    classes: tuple[int, ...] | None = None
    """Only images of these classes, which become the labels 0, 1, ... in this order. None: all."""
    coarse: bool = False
    """The 20 coarse classes of cifar100."""
    random_labels: float = 0.0
    """Share of the training images whose labels are drawn at random."""
    arch: str = "demo"
    """Name of the network for ``build_network``, or "demo": three convolutions and a linear layer."""
    scheme: str = "pgm"
    norm: Literal["2", "inf", "1"] = "2"
    """Of the radius of FGM and PGM; WRM has none."""
    eps: float | None = None
    """Radius of FGM and PGM, in units of the input (pixels in [0, 1], or whitened); 1 / (2 gamma) of WRM. Under "erm"
    it serves the evaluation only. None: the data set's default, filled in by ``with_strength``."""
    other_eps: float | None = None
    """Of the other kind of attack, for the evaluation: 1 / (2 gamma) where ``eps`` is a radius, else a radius."""
    steps: int = 15
    attack_labels: str = "true"
    """What training's attacks move away from: "true" labels, or as the published code the "predicted" ones."""
    beta: float
    single: bool = False
    """Train the network with ``beta`` alone, without the one of beta = inf beside it."""
    gradient: Literal["detached", "full"] = "detached"
    """Of the normalisation: "detached" holds u and v constant; "full" goes through the iteration, as published."""
    normalization: Literal["parametrization", "projection"] = "parametrization"
    """"parametrization": the forward divides by the norm, as published. "projection": the weights are scaled back after
    each step, and the gradient knows nothing of it; ``gradient`` is then without meaning."""
    epochs: int
    batch_size: int = 50
    drop_last: bool = False
    """Leave out the last batch of an epoch if it is short."""
    optimizer: str = "sgd"
    """"sgd" with momentum 0.9, or "adam"."""
    lr: float = 0.05
    lr_decay: str = "none"
    """lr * 0.95^(t / 390) with t counted in "epoch"s (as published) or in "step"s (as was meant)."""
    weight_decay: float | None = None
    """Coefficient of the squared weights; None: what the network is defined with, mostly 0."""
    stop_accuracy: float = 0.0
    """Stop when the training accuracy, mean over five epochs, reaches it; 0: never."""
    reference: bool = False
    """As the published code where that is less exact: FGM's gradient norm in float32, which underflows, and weight
    decay counted in every copy of the network."""
    evaluation: str = "curves"
    """At the end: "curves": accuracies under every attack with the true labels, a robustness curve, margins.
    "published": accuracies clean and under the training's attack with the network's own predictions for labels."""
    seed: int = 0
    device: str
    threads: int = 1
    """Of PyTorch on the CPU. The layers are too small to gain much from a second thread, and where others compute too,
    threads that wait for each other made the job ten times slower (measured)."""
    precision: str = "float32"
    """"bfloat16": forward and attacks under autocast; weights stay in float32."""
    compile: bool = False
    """Training steps and attacks through torch.compile."""
    tensorboard: bool = False
    keep_every: int = 0
    """Keep the weights of every so many epochs in files of their own; 0: of none."""

    @classmethod
    def create(cls, **options: Any) -> TrainConfig:
        """A configuration from some options by name; None or absent: the default, which may depend on the data set."""
        given = {name: value for name, value in options.items() if value is not None}
        unknown = given.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise TypeError(f"TrainConfig.create() got an unexpected keyword argument {min(unknown)!r}")
        given["norm"] = _named(given.get("norm", cls.norm), _NORM_NAMES)  # 2 and inf may come as numbers
        given["scheme"] = _named(given.get("scheme", cls.scheme), _SCHEME_NAMES)
        data = given.get("data", cls.data)
        _check_choice("data", data, data_set_names())
        default = defaults_of(data)
        given["device"] = _resolved_device(given.get("device", "auto"))
        for name in ("arch", "train_size", "beta", "epochs"):
            given.setdefault(name, getattr(default, name))
        for field in fields(cls):
            if field.name not in given:
                try:
                    given[field.name] = default.option(field.name, given["arch"], given.get("optimizer"))
                except KeyError:
                    continue
        config = cls(**given)
        return config if default.strength.relative else config.with_strength(math.nan)

    def with_strength(self, mean_norm: float) -> TrainConfig:
        """With the attacks' strengths filled in where they are the data set's defaults.

        Args:
            mean_norm: mean l2 norm of the training images; not read where the defaults are absolute.
        """
        strength = defaults_of(self.data).strength
        ball, transport = strength.eps_of_ball(self.norm, mean_norm), strength.eps_of_transport(mean_norm)
        own, other = (transport, ball) if self.scheme == "wrm" else (ball, transport)
        return replace(
            self,
            eps=own if self.eps is None else self.eps,
            other_eps=other if self.other_eps is None else self.other_eps,
        )

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(field.name, str(field.type), getattr(self, field.name)))
        _check_choice("data", self.data, data_set_names())
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        architectures = ("demo", *network_names())
        if self.arch not in architectures:
            near = tuple(difflib.get_close_matches(self.arch, architectures))
            _check_choice("arch", self.arch, near or architectures)
        for name in ("eps", "other_eps", "lr"):
            value = getattr(self, name)
            _check(name, value, value is None or 0 < value < math.inf, "must be a finite number > 0")
        for name in ("train_size", "test_size", "steps", "epochs", "batch_size"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "must be an integer >= 1")
            _check(name, value, value is None or value < 2**31, "must be an integer < 2147483648")
        threads = self.threads
        _check("threads", threads, 1 <= threads <= MOST_THREADS, f"must be an integer from 1 to {MOST_THREADS}")
        size = self.validation_size
        _check("validation_size", size, size is None or size >= 0, "must be an integer >= 0")
        _check("keep_every", self.keep_every, self.keep_every >= 0, "must be an integer >= 0")
        _check("seed", self.seed, 0 <= self.seed < 2**32, "must be an integer from 0 to 4294967295")
        for name in ("random_labels", "stop_accuracy"):
            value = getattr(self, name)
            _check(name, value, 0 <= value <= 1, "must be a number from 0 to 1")
        decay = self.weight_decay
        _check("weight_decay", decay, decay is None or 0 <= decay < math.inf, "must be a finite number >= 0")
        _check("beta", self.beta, self.beta > 0, "must be a number > 0")
        comparable = self.single or self.beta < math.inf
        _check("beta", self.beta, comparable, "the comparison is with inf; give a finite number, or choose single")
        capped = self.beta == math.inf or self.arch == "demo" or bool(normalized_layers(self.arch))
        _check("arch", self.arch, capped, "it caps no layer; choose a name with _sn, or single and beta inf")

    def data_options(self) -> dict[str, Any]:
        """Arguments of ``load_data`` besides the name: everything that decides which samples a run has."""
        return {
            "root": self.data_dir,
            "train_size": self.train_size,
            "test_size": self.test_size,
            "seed": self.seed,
            "validation_size": self.validation_size,
            "split": self.split,
            "classes": self.classes,
            "coarse": self.coarse,
            "random_labels": self.random_labels,
            "allow_partial": self.allow_partial,
            **published_options(self.data),
        }

    @property
    def betas(self) -> tuple[float, ...]:
        """One per network to train."""
        return (self.beta,) if self.single else (math.inf, self.beta)

    @property
    def training_adversary(self) -> Adversary:
        return self.adversary(self.scheme)

    def adversary(self, scheme: str) -> Adversary:
        """The attack ``scheme``, at this run's eps where it is an eps of that kind, else at ``other_eps``."""
        eps = self.eps if (scheme == "wrm") == (self.scheme == "wrm") else self.other_eps
        assert eps is not None, "with_strength was not called"
        return Adversary(
            scheme, self.norm, eps, self.steps, autocast_dtype=self.autocast_dtype, reference=self.reference
        )

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.precision == "bfloat16" else None

    def key(self) -> str:
        """A name of what the run computes: short, the same on every machine, and stable when options are added.

        The folder counts where its name alone tells images from others.
        """
        values: dict[str, Any] = {}
        data_set = find_data_set(self.data)
        if self.data_dir is not None and not (data_set.official or data_set.embedded):
            values["data_dir"] = str(Path(self.data_dir).expanduser().resolve())
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in _OF_THE_MACHINE and value != field.default:
                values[field.name] = json_number(value) if isinstance(value, float) else value
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        return f"{self.data}-{self.arch}-{self.scheme}-{self.norm}-beta{self.beta:g}-seed{self.seed}-{digest[:8]}"

    def learning_rate(self, epoch: int, step: int) -> float:
        """For the step ``step`` of all, in the epoch ``epoch``, both counted from 0."""
        t = {"none": 0, "epoch": epoch, "step": step}[self.lr_decay]
        return float(self.lr * _DECAY ** (t / _DECAY_PERIOD))

    def batches(self, samples: int) -> int:
        """Steps of an epoch over so many samples."""
        return samples // self.batch_size if self.drop_last else math.ceil(samples / self.batch_size)

    def check_training_images(self, number: int) -> None:
        """Raise OptionError if an epoch over so many images has no step."""
        remedy = f"the {number} training images are fewer, and a short batch is left out; give at most that"
        _check("batch_size", self.batch_size, self.batches(number) > 0, remedy)

    def stops_after(self, accuracies: Sequence[float]) -> bool:
        """Whether training ends after the epochs with these training accuracies, before ``epochs`` are done."""
        last = deque(accuracies, maxlen=_STOP_EPOCHS)
        return self.stop_accuracy > 0 and len(last) == _STOP_EPOCHS and sum(last) / len(last) >= self.stop_accuracy

    def to_json(self) -> dict[str, Any]:
        """As a file holds it; JSON has no infinity."""
        return {**asdict(self), "beta": json_number(self.beta)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainConfig:
        config = cls(**{**values, "beta": float(values["beta"])})
        return config if defaults_of(config.data).strength.relative else config.with_strength(math.nan)

    def refuse_changes(self, options: Mapping[str, Any]) -> None:
        """Raise OptionError if an option that is not None differs from this configuration."""
        for name, value in options.items():
            mine = getattr(self, name)
            value = _named(value, {"norm": _NORM_NAMES, "scheme": _SCHEME_NAMES}.get(name, {})) if value else value
            same = value is None or value in (mine, str(mine)) or (name == "device" and value == "auto")
            _check(name, value, same, f"the run to resume has {mine}; leave the option out, or start a new run")


_OF_THE_MACHINE = ("data_dir", "device", "threads", "compile", "tensorboard", "keep_every")
_CHOICES = {
    "split": SPLITS,
    "scheme": SCHEMES,
    "norm": NORMS,
    "attack_labels": ATTACK_LABELS,
    "gradient": GRADIENTS,
    "normalization": NORMALIZATIONS,
    "optimizer": OPTIMIZERS,
    "lr_decay": DECAYS,
    "evaluation": EVALUATIONS,
    "precision": PRECISIONS,
}


def json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _named(value: Any, names: Mapping[str, str]) -> Any:
    """A name in its first form, of numbers and of names in another case too."""
    if not names:
        return value
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return names.get(text.lower(), text)


def _resolved_device(device: str) -> str:
    _check_choice("device", device, DEVICES)
    available = torch.cuda.is_available()
    _check("device", device, available or device != "cuda", "this PyTorch has no CUDA device; choose cpu")
    if device == "auto":
        return "cuda" if available else "cpu"
    return device


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    _check(name, value, value in choices, "choose " + " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1]))))


def _check(name: str, value: object, valid: bool, remedy: str) -> None:
    if not valid:
        raise OptionError(name, value, remedy)
