"""Accuracy against the strength of attacks: a panel for each defence and attack, a curve for each network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ...errors import OptionError
from .. import figures
from ..data import Samples
from ..training import TrainedNetwork
from ..training.adversary import Adversary
from ..training.config import ATTACK_LABELS
from ..training.errors import Diverged
from ..training.evaluate import CURVE_FACTORS, accuracy, attacked
from .results import Analysis, Row, check_networks, check_samples
from .runs import published_order

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NOMINAL = "nominal ε"


@dataclass(frozen=True)
class RobustnessCurve:
    """One network under one attack of growing strength.

    Attributes:
        defence: what the network was trained with; ``network`` is its name beside others of that defence.
        attack: name of the attack; ``scheme`` and ``norm`` are those of the ``Adversary``.
        unit: eps of the attack as given, which is marked in the figure.
        eps: strengths; in ``norm``, or 1 / (2 gamma) of WRM.
        accuracy: in [0, 1], one per eps; None where a logit was not finite.
    """

    defence: str
    network: str
    attack: str
    scheme: str
    norm: str
    unit: float
    eps: tuple[float, ...]
    accuracy: tuple[float | None, ...]


@dataclass(frozen=True)
class RobustnessCurves(Analysis):
    """Accuracy under attacks; see ``robustness_curves``."""

    curves: tuple[RobustnessCurve, ...]
    labels: str
    samples: int

    columns = ("defence", "network", "attack", "scheme", "norm", "eps", "accuracy", "images")

    def rows(self) -> list[Row]:
        """One per network, attack and eps."""
        return [
            (c.defence, c.network, c.attack, c.scheme, c.norm, eps, value, self.samples)
            for c in self.curves
            for eps, value in zip(c.eps, c.accuracy)
        ]

    def _draw(self) -> Figure:
        defences = list(dict.fromkeys(curve.defence for curve in self.curves))
        attacks = list(dict.fromkeys(curve.attack for curve in self.curves))
        styles = figures.look_of(curve.network for curve in self.curves)
        columns = None if len(defences) == 1 or len(attacks) == 1 else len(attacks)
        figure, axes = figures.panels(len(defences) * len(attacks), columns)
        places = dict(zip(((d, a) for d in defences for a in attacks), axes))
        for curve in self.curves:
            axis = places[curve.defence, curve.attack]
            style = figures.series(styles[curve.network])
            axis.plot(curve.eps, figures.percent(curve.accuracy), label=curve.network, **style)
            axis.set_xlabel(figures.eps_label(curve.scheme, curve.norm))
            figures.panel_title(axis, f"{curve.defence}, attacked by {curve.attack}")
            figures.accuracy_axis(axis)
        for (defence, attack), axis in places.items():
            unit = next(c.unit for c in self.curves if (c.defence, c.attack) == (defence, attack))
            axis.axvline(unit, linestyle=":", label=_NOMINAL, **figures.GUIDE)
        figures.titled(figure, f"Accuracy of {self.samples:,} images under attack, away from the {self.labels} labels")
        figures.legend_below(figure, axes, last=_NOMINAL)
        return figure


def robustness_curves(
    networks: Mapping[str, Mapping[str, nn.Module]],
    samples: Samples,
    attacks: Mapping[str, Adversary],
    *,
    factors: Sequence[float] = CURVE_FACTORS,
    labels: str = "predicted",
) -> RobustnessCurves:
    """Accuracy (against the true labels) of networks under attacks of growing strength.

    Every attack of ``attacks`` on every defence gives a panel, which shows the networks of that defence.

    Args:
        networks: {defence: {name: network}}, as ``by_defence`` gives.
        samples: images to attack, on the device of the networks.
        attacks: {name: attack}; its eps is the unit of ``factors``.
        factors: multiples of eps, at least 0.
        labels: what the attacks move away from: "predicted" labels, as in the published curves, or "true" ones.

    Raises:
        OptionError: an argument is empty or out of range.
    """
    check_networks(networks)
    check_samples(samples)
    if not attacks:
        raise OptionError("attacks", attacks, "give at least one")
    if clean := [name for name, attack in attacks.items() if attack.scheme == "erm"]:
        raise OptionError("attacks", clean[0], "erm attacks nothing; give fgm, pgm or wrm")
    if not len(factors) or not all(0 <= factor < float("inf") for factor in factors):
        raise OptionError("factors", factors, "give finite multiples of eps, at least 0")
    if labels not in ATTACK_LABELS:
        raise OptionError("labels", labels, f"choose {' or '.join(ATTACK_LABELS)}")
    curves = []
    for defence, members in networks.items():
        for name, model in members.items():
            clean_accuracy = _accuracy(model, samples, Adversary("erm", "2", 0.0, 1), labels) if 0 in factors else None
            for attack, adversary in attacks.items():
                scaled = [adversary.scaled(factor) for factor in factors]
                values = (_accuracy(model, samples, a, labels) if a.eps else clean_accuracy for a in scaled)
                about = (defence, name, attack, adversary.scheme, adversary.norm, adversary.eps)
                curves.append(RobustnessCurve(*about, tuple(a.eps for a in scaled), tuple(values)))
    return RobustnessCurves(tuple(curves), labels, len(samples))


def by_defence(networks: Iterable[TrainedNetwork]) -> dict[str, dict[str, nn.Module]]:
    """Trained networks as the analyses take them: {"PGM": {"no SN (β = ∞)": model, "β = 2": model}, ...}.

    Raises:
        OptionError: two networks have the same scheme and beta.
    """
    found: dict[str, dict[str, nn.Module]] = {}
    for network in sorted(networks, key=lambda network: published_order(network.beta)):
        members = found.setdefault(network.config.scheme.upper(), {})
        name = figures.beta_label(network.beta)
        if name in members:
            value = f"{network.config.scheme}, {name}"
            raise OptionError("networks", value, "two networks have this scheme and beta; name them yourself")
        members[name] = network.model
    return found


def _accuracy(model: nn.Module, samples: Samples, adversary: Adversary, labels: str) -> float | None:
    try:
        return accuracy(attacked(model, samples, adversary, labels=labels).logits, samples.y)
    except Diverged:
        return None
