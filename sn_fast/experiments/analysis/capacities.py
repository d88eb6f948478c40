"""The theory's capacities of trained networks, beside the generalisation gaps that were measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import OptionError, require
from ...theory import capacity, gradient_norms, margins
from .. import figures
from ..data import Samples
from ..reproduction import Outcome
from ..training import TrainedNetwork
from ..training.evaluate import attacked
from .results import Analysis, Row, check_samples, finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KAPPA_QUANTILE = 0.05


@dataclass(frozen=True)
class NetworkCapacity:
    """One trained network.

    Attributes:
        training_images: their number; None: all of the data set.
        random_labels: share of them whose labels are drawn at random.
        gap: accuracy on training images less that on test images, under the attack trained with.
        margin: median of the positive margins on training images under that attack; nan if there is none.
        kappa: the quantile ``KAPPA_QUANTILE`` of ||d loss / d x||_2 on training images; None for ERM and WRM.
        log10_capacity: log10 Phi; infinite where the theorem's condition fails (kappa = 0, or L >= lam).
        log10_complexity: log10(Phi / margin^2), what the theorem compares networks by at one sample size; None
            without a margin.
        notes: of the capacity, and why it is infinite.
    """

    data: str
    training_images: int | None
    random_labels: float
    scheme: str
    arch: str
    beta: float
    seed: int
    gap: float
    margin: float
    kappa: float | None
    log10_capacity: float
    log10_complexity: float | None
    product: float
    ratio_sum: float
    attack_factor: float
    notes: str


@dataclass(frozen=True)
class Capacities(Analysis):
    """Capacities of networks; see ``capacities``."""

    networks: tuple[NetworkCapacity, ...]

    columns = (
        *("data", "training images", "random labels", "scheme", "arch", "beta", "seed"),
        *("gap", "margin", "kappa", "log10 Phi", "log10 Phi/margin^2"),
        *("product of norms", "sum of ratios", "attack factor", "notes"),
    )

    def rows(self) -> list[Row]:
        return [
            (
                *(n.data, n.training_images, n.random_labels, n.scheme, n.arch, n.beta, n.seed),
                *(n.gap, finite(n.margin), n.kappa, finite(n.log10_capacity)),
                *(n.log10_complexity, finite(n.product), finite(n.ratio_sum), finite(n.attack_factor), n.notes),
            )
            for n in self.networks
        ]

    def rank_correlation(self, scheme: str | None = None) -> float | None:
        """Kendall's tau-b, of Phi / margin^2 with the gap, over the networks of a scheme or all; None of fewer than
        three, or where one of the two is constant.

        1: the larger of any two capacities has the larger gap; 0: as by chance. Networks without a finite value are
        left out. The capacity does not know the number of training images: compare networks of one number.
        """
        pairs = [
            (n.log10_complexity, n.gap)
            for n in self.networks
            if scheme in (None, n.scheme) and n.log10_complexity is not None and math.isfinite(n.log10_complexity)
        ]
        if len(pairs) < 3 or any(len({pair[i] for pair in pairs}) == 1 for i in (0, 1)):
            return None
        return float(require("scipy.stats").kendalltau(*zip(*pairs)).statistic)

    def _draw(self) -> Figure:
        schemes = list(dict.fromkeys(n.scheme for n in self.networks))
        figure, axes = figures.panels(len(schemes))
        for axis, scheme in zip(axes, schemes):
            members = [n for n in self.networks if n.scheme == scheme]
            for capped, noisy in itertools.product((False, True), repeat=2):
                chosen = [n for n in members if (math.isfinite(n.beta), n.random_labels > 0) == (capped, noisy)]
                points: list[Any] = [(n.log10_complexity, 100 * n.gap) for n in chosen if _is_shown(n)]
                if points:
                    axis.plot(
                        *zip(*points),
                        figures.MARKERS[capped],
                        color=figures.COLOURS[capped],
                        fillstyle="none" if noisy else "full",
                        label=("SN, finite β" if capped else "no SN (β = ∞)") + (", random labels" if noisy else ""),
                    )
            correlation = self.rank_correlation(scheme)
            rank = "" if correlation is None else f", Kendall's τ = {correlation:+.2f}"
            left_out = sum(not _is_shown(n) for n in members)
            missing = f", {left_out} infinite" if left_out else ""
            axis.set(
                title=f"{scheme.upper()}{rank}{missing}",
                xlabel="log₁₀(Φ / margin²)",
                ylabel="accuracy gap, training − test (%)",
            )
        figures.titled(figure, "Capacity of trained networks against their measured gaps")
        figures.legend_below(figure, axes)
        return figure


def capacities(
    members: Iterable[tuple[Outcome, TrainedNetwork]], samples: Samples | Callable[[Outcome], Samples]
) -> Capacities:
    """Phi of ERM, FGM, PGM or WRM (``sn_fast.theory.capacity``) of networks, each under the scheme it was trained with.

    The theorem's kappa, the least gradient norm, is 0 in practice; a small quantile stands for it. Networks whose
    activations are not smooth are taken as if they were, with a note. Networks outside the theorem's setting (branches,
    normalisation of batches) have no finite value, with the reason.

    Args:
        members: finished runs and their networks.
        samples: training images, with the labels trained on, for margins and gradient norms; of runs that were not
            trained on the same images (seeds draw subsets, and random labels) a function that gives those of a run.

    Raises:
        OptionError: there is no network, or no image.
    """
    found = tuple(
        _measured(outcome, network, samples(outcome) if callable(samples) else samples) for outcome, network in members
    )
    if not found:
        raise OptionError("members", "0 networks", "compute the runs first")
    return Capacities(found)


def _measured(outcome: Outcome, network: TrainedNetwork, samples: Samples) -> NetworkCapacity:
    check_samples(samples)
    config, model = network.config, network.model
    adversary = config.training_adversary
    logits = attacked(model, samples, adversary, labels=config.attack_labels).logits
    lead = margins(logits, samples.y).double()
    margin = float(lead[lead > 0].median())
    strength: dict[str, Any] = {}
    kappa = None
    if config.scheme in ("fgm", "pgm"):
        kappa = float(gradient_norms(model, samples.x, samples.y).double().quantile(KAPPA_QUANTILE))
        strength = {"eps": adversary.eps, "kappa": kappa}
    elif config.scheme == "wrm":
        strength = {"lam": 1 / adversary.eps}  # eps = 1 / (2 gamma), and lam = 2 gamma
    if config.scheme == "pgm":
        strength |= {"alpha": 2 * adversary.eps / adversary.steps, "steps": adversary.steps}
    log10_capacity, terms, notes = _capacity(model, config.scheme, samples, strength)
    return NetworkCapacity(
        data=config.data,
        training_images=config.train_size,
        random_labels=config.random_labels,
        scheme=config.scheme,
        arch=config.arch.removesuffix("_sn"),
        beta=network.beta,
        seed=config.seed,
        gap=outcome.accuracy("train") - outcome.accuracy("test"),
        margin=margin,
        kappa=kappa,
        log10_capacity=log10_capacity,
        log10_complexity=log10_capacity - 2 * math.log10(margin) if margin > 0 else None,
        product=terms.get("product", math.inf),
        ratio_sum=terms.get("ratio_sum", math.inf),
        attack_factor=terms.get("attack_factor", math.inf),
        notes=notes,
    )


def _capacity(
    model: nn.Module, scheme: str, samples: Samples, strength: Mapping[str, Any]
) -> tuple[float, Mapping[str, Any], str]:
    """log10 Phi, its terms, and notes; infinite, none, and the reason where there is no such number."""
    if strength.get("kappa") == 0:
        return math.inf, {}, f"kappa is 0: {KAPPA_QUANTILE:.0%} of the gradients vanish; the theorem needs kappa > 0"
    try:
        phi = capacity(model, scheme, example_input=samples.x[:1], assume_smooth=True, **strength)
    except ValueError as error:
        return math.inf, {}, str(error)
    return phi.log_total / math.log(10), phi.terms, "; ".join((*phi.notes, *((phi.reason,) if phi.reason else ())))


def _is_shown(network: NetworkCapacity) -> bool:
    return network.log10_complexity is not None and math.isfinite(network.log10_complexity)
