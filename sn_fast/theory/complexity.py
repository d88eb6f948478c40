"""The expression under the O(.) of the generalisation theorems, as a number."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layers.weighted import as_int
from .capacity import Capacity, capacity_of
from .logarithms import exp, log, log_sum
from .norms import network_norms
from .schemes import Scheme, positive


@dataclass(frozen=True)
class Complexity:
    """The theorem's expression with constant 1, which bounds nothing: its constant is not known.

    Attributes:
        total: the root of the sum of ``terms``; infinite where it exceeds float64, or where the capacity is infinite.
        log_total: its natural logarithm.
        terms: "capacity", Beff^2 d^2 h log(d h) Phi / (gamma^2 n), and "confidence", d log(d n / delta) / (gamma^2 n).
        factors: gamma, n, delta, B, Beff, d, h, and M for "wrm".
        capacity: Phi with its own terms.
    """

    total: float
    log_total: float
    terms: dict[str, float]
    factors: dict[str, float]
    capacity: Capacity

    def __float__(self) -> float:
        return self.total

    @property
    def notes(self) -> tuple[str, ...]:
        """What the theorem does not cover."""
        return self.capacity.notes

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and strings."""
        own = {name: getattr(self, name) for name in ("total", "log_total", "terms", "factors")}
        return {**own, "capacity": self.capacity.to_dict()}


def complexity(
    model: nn.Module,
    scheme: str,
    *,
    gamma: float,
    n: int,
    delta: float,
    B: float,
    example_input: Tensor,
    h: int | None = None,
    M: float | None = None,
    eps: float | None = None,
    kappa: float | None = None,
    alpha: float | None = None,
    steps: int | None = None,
    lam: float | None = None,
    certified: bool = False,
    assume_smooth: bool = False,
) -> Complexity:
    """sqrt((Beff^2 d^2 h log(d h) Phi + d log(d n / delta)) / (gamma^2 n)), the theorem's expression with constant 1.

    The theorem says that adversarial error exceeds the share of training samples whose margin under attack is at most
    gamma by no more than O(.) of this. It is no bound, as the constant is not known: compare networks by it, not an
    error with it.

    Args:
        gamma: the margin, > 0, in the units of the logits.
        n: number of training samples.
        delta: probability with which the theorem may fail, in (0, 1); the paper's eta.
        B: largest l2 norm of an input.
        h: number of units per layer. None: the largest number of outputs of a layer.
        M: largest l2 norm of the loss gradient in x, for "wrm". None: sqrt(2) prod_i ||W_i||, which bounds that of the
            cross entropy.
        model, scheme, example_input, eps, kappa, alpha, steps, lam, certified, assume_smooth: as in ``capacity``.

    Raises:
        ValueError, TypeError: as ``capacity``; ValueError also for gamma, n, delta, B, h or M out of range.
    """
    given = {"eps": eps, "kappa": kappa, "alpha": alpha, "steps": steps, "lam": lam}
    chosen = Scheme.create(scheme, given)
    gamma, radius, failure = positive("gamma", gamma), positive("B", B), positive("delta", delta)
    if failure >= 1:
        raise ValueError(f"delta={delta!r} must be in (0, 1)")
    n = as_int("n", n, minimum=1)
    if M is not None and scheme != "wrm":
        raise ValueError(f"M={M!r}: scheme={scheme!r} takes none; it is of 'wrm'")
    norms = network_norms(model, example_input, certified=certified)
    phi = capacity_of(norms, chosen, assume_smooth)
    depth, width = len(phi.layers), norms.width if h is None else as_int("h", h, minimum=1)
    log_slope = log(positive("M", M)) if M is not None else 0.5 * math.log(2) + norms.log_product
    log_reach = {"erm": -math.inf, "wrm": log_slope - log(chosen.lam) if scheme == "wrm" else 0.0}
    log_beff = log_sum((log(radius), log_reach.get(scheme, log(chosen.eps))))

    log_scale = -2 * math.log(gamma) - math.log(n)
    log_sizes = 2 * math.log(depth) + math.log(width) + log(math.log(depth * width))
    logs = {
        "capacity": phi.log_total + (0.0 if math.isinf(phi.log_total) else 2 * log_beff + log_sizes + log_scale),
        "confidence": math.log(depth) + log(math.log(depth * n / failure)) + log_scale,
    }
    logs = {name: norms.up(value) for name, value in logs.items()}
    log_total = norms.up(log_sum(logs.values()) / 2)
    factors = {"gamma": gamma, "n": float(n), "delta": failure, "B": radius, "Beff": exp(log_beff)}
    factors |= {"d": float(depth), "h": float(width)} | ({"M": exp(log_slope)} if scheme == "wrm" else {})
    return Complexity(exp(log_total), log_total, {k: exp(v) for k, v in logs.items()}, factors, phi)
