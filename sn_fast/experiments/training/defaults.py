"""What an option is where the user leaves it out; it depends on the data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UserError
from ..data.registry import find_data_set


@dataclass(frozen=True)
class Strength:
    """Default strength of the attacks on a data set, absolute or in units of its mean image norm E||x||_2."""

    radius: Mapping[str, float]
    """eps of FGM and PGM, by norm."""
    transport: float
    """WRM: eps = 1 / (2 gamma); ``relative``: gamma / E||x||_2."""
    relative: bool = False
    """The l2 radius and gamma are multiples of E||x||_2; radii in the other norms are absolute."""

    def eps_of_ball(self, norm: str, mean_norm: float) -> float:
        return self.radius[norm] * (mean_norm if self.relative and norm == "2" else 1.0)

    def eps_of_transport(self, mean_norm: float) -> float:
        return 1 / (2 * self.transport * mean_norm) if self.relative else self.transport


@dataclass(frozen=True)
class DataDefaults:
    """Default options of a run on one data set."""

    arch: str
    strength: Strength
    beta: float
    epochs: int
    train_size: int | None = None
    """None: all."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Other options of ``TrainConfig``, by name."""
    by_arch: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Options of the networks whose names begin so; they go before ``options``."""

    def option(self, name: str, arch: str, optimizer: str | None = None) -> Any:
        """The default of an option for a network; KeyError: it does not depend on the data set.

        An ``optimizer`` that was chosen in place of the default one has the published step size of its own.
        """
        options = {**self.options}
        for prefix, of_arch in self.by_arch.items():
            if arch.startswith(prefix):
                options |= of_arch
        if optimizer not in (None, options.get("optimizer", "sgd")):
            options |= _OF_OPTIMIZER.get(optimizer, {})
        return options[name]


_ADAM = {"optimizer": "adam", "lr": 1e-3, "lr_decay": "none"}
_MOMENTUM = {"optimizer": "sgd", "lr": 0.01, "lr_decay": "epoch"}
_OF_OPTIMIZER = {"adam": _ADAM, "sgd": _MOMENTUM}

# Farnia, Zhang, Tse (2019), section 5 and the published code: batches of 128 without the short last one, at most 200
# epochs, Adam for one channel and for the fully connected networks, else momentum 0.9 with a decay that is so slow
# because the published code counts epochs where it meant steps (lr_decay="step" is what was meant).
_PUBLISHED = {
    "batch_size": 128,
    "drop_last": True,
    "stop_accuracy": 0.999,
    "attack_labels": "predicted",
    "gradient": "full",
    "evaluation": "published",
}
_COLOUR = DataDefaults(
    "alexnet_sn",
    Strength({"2": 0.05, "inf": 0.1, "1": 5.0}, 0.002, relative=True),
    beta=1.6,
    epochs=200,
    options=_PUBLISHED | _MOMENTUM,
    by_arch={"mlp": _ADAM, "softmax": _ADAM},
)

_GREY = DataDefaults(
    "mlp1_relu_sn",
    Strength({"2": 0.05, "inf": 0.1, "1": 5.0}, 0.04, relative=True),
    beta=4.0,
    epochs=200,
    options=_PUBLISHED | _ADAM,
)

_DEFAULTS = {
    "digits": DataDefaults("demo", Strength({"2": 0.8, "inf": 0.15, "1": 4.0}, 0.3), 1.6, 180, 200),
    "mnist5k": DataDefaults("demo", Strength({"2": 1.5, "inf": 0.15, "1": 15.0}, 1.0), 2.0, 40, 500),
    "mnist": _GREY,
    "cifar10": _COLOUR,
    "cifar100": _COLOUR,
    "svhn": _COLOUR,
}


def defaults_of(data: str) -> DataDefaults:
    """Of a data set by its name: its own defaults, or those of the set that it is like.

    Raises:
        UserError: a set is not known, or sets are like each other and none has defaults.
    """
    name, passed = data, list[str]()
    while name not in _DEFAULTS:
        if name in passed:
            raise UserError(
                f"data set {data!r}: DataSet(like={find_data_set(passed[-1]).like!r}) leads to no defaults; "
                f"name one of {', '.join(_DEFAULTS)}"
            )
        passed.append(name)
        name = find_data_set(name).like
    return _DEFAULTS[name]
