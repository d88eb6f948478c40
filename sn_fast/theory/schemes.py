"""The training schemes of the theorems, their parameters, and what each adds to the capacity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..layers.weighted import as_int
from .logarithms import exp, log, log_geometric, log_one_plus

SCHEMES = ("erm", "fgm", "pgm", "wrm")
_TAKES = {"erm": (), "fgm": ("eps", "kappa"), "pgm": ("eps", "kappa", "alpha", "steps"), "wrm": ("lam",)}
_STEPS = 15


@dataclass(frozen=True)
class Scheme:
    """A scheme with its parameters, all checked; see ``capacity``."""

    name: str
    eps: float = 0.0
    kappa: float = math.inf
    alpha: float = 0.0
    steps: int = 1
    lam: float = math.inf

    @staticmethod
    def create(name: str, given: Mapping[str, Any]) -> Scheme:
        """Of the parameters given, None for those that are not.

        Raises:
            ValueError: an unknown scheme, a parameter that it does not take, one that is missing or out of range.
        """
        if name not in SCHEMES:
            raise ValueError(f"scheme={name!r} is unknown; choose one of {', '.join(SCHEMES)}")
        values = {key: value for key, value in given.items() if value is not None}
        for key, value in values.items():
            if key not in _TAKES[name]:
                taken = ", ".join(_TAKES[name]) or "no parameters of an attack"
                raise ValueError(f"{key}={value!r}: scheme={name!r} takes {taken}")
        if name == "erm":
            return Scheme(name)
        if name == "wrm":
            if "lam" not in values:
                raise ValueError("scheme='wrm' needs lam, the price of moving: lam = 2 gamma of sn_fast.attacks.wrm")
            return Scheme(name, lam=positive("lam", values["lam"], finite=False))
        for key in ("eps", "kappa"):
            if key not in values:
                meaning = {"eps": "the radius of the attack", "kappa": "the least norm of the loss gradient in x"}[key]
                raise ValueError(f"scheme={name!r} needs {key}, {meaning}")
        eps, kappa = positive("eps", values["eps"], zero=True), positive("kappa", values["kappa"], finite=False)
        steps = as_int("steps", values.get("steps", _STEPS), minimum=1)
        alpha = positive("alpha", values.get("alpha", 2 * eps / steps), zero=True)
        return Scheme(name, eps, kappa, alpha, steps)

    def log_excess(self, log_l: float) -> float:
        """log a: the network's norms are multiplied by 1 + a, where L = exp(log_l) bounds the slope of the gradient."""
        if self.name == "fgm":
            return log(self.eps / self.kappa) + log_l if self.eps else -math.inf
        if self.name == "pgm":
            rate = log(self.alpha / self.kappa)
            if math.isinf(rate) or math.isinf(log_l):
                return rate + log_l
            return rate + log_l + log_geometric(math.log(2) + rate + log_l, self.steps)
        if self.name == "wrm":
            return self._log_excess_of_wrm(log_l)
        return -math.inf

    def _log_excess_of_wrm(self, log_l: float) -> float:
        slope = exp(log_l)
        if math.isinf(self.lam) and math.isfinite(slope):
            return -math.inf
        return log_l - math.log(math.nextafter(self.lam - slope, 0.0)) if slope < self.lam else math.inf

    def why_infinite(self, log_l: float) -> str:
        """Why there is no finite capacity, or nothing."""
        if self.name == "wrm" and exp(log_l) >= self.lam:
            return (
                f"L = {exp(log_l):.6g} is not below lam = {self.lam:.6g}: the attack's problem need not be concave; "
                "the theorem needs L < lam"
            )
        return ""

    def terms(self) -> dict[str, float]:
        """The parameters by name."""
        if self.name == "fgm":
            return {"eps": self.eps, "kappa": self.kappa}
        if self.name == "pgm":
            return {"eps": self.eps, "kappa": self.kappa, "alpha": self.alpha, "steps": float(self.steps)}
        return {"lam": self.lam} if self.name == "wrm" else {}


def log_factor(scheme: Scheme, log_l: float) -> float:
    """log of what the attack multiplies the product of the norms by."""
    return log_one_plus(scheme.log_excess(log_l))


def positive(name: str, value: Any, *, zero: bool = False, finite: bool = True) -> float:
    """``value`` as a float that is above 0 (or at least 0), and finite if wanted."""
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not number >= 0 or (number == 0 and not zero) or (finite and math.isinf(number)):
        kind = "a finite number" if finite else "a number"
        raise ValueError(f"{name}={value!r} must be {kind} {'>= 0' if zero else '> 0'}")
    return number
