"""Accuracy of one network under attacks of several strengths, beside the accuracy that is certified."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ... import lipschitz_bound
from ...errors import OptionError, UserError, first_line
from ...running import progress_bar
from .. import figures
from ..analysis import Analysis
from ..analysis.results import Row, check_samples
from ..data import Samples
from ..training.adversary import Adversary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BATCH_SIZE = 250


@dataclass(frozen=True)
class Strength:
    """One attack at one strength.

    Attributes:
        accuracy: share of the images that are still classified as their true labels, in [0, 1].
        certified: share that no perturbation within eps can change, a lower bound of the accuracy under any attack;
            None where nothing is certified.
        mean_distance: l2 distance that the attack moved an image, on average.
    """

    adversary: Adversary
    accuracy: float
    certified: float | None
    mean_distance: float

    @property
    def norm(self) -> str:
        """Of eps; empty of WRM, which has none."""
        return "" if self.adversary.scheme == "wrm" else self.adversary.norm


@dataclass(frozen=True)
class AttackReport(Analysis):
    """A network under attack; see ``attack_network``.

    Attributes:
        lipschitz: certified l2 Lipschitz constant; infinite with ``reason`` where there is none, nan if not asked for.
        examples: {"x", "y", "ATTACK_NORM_EPS", ...}: images before and after each attack, if they were to be kept.
    """

    images: int
    labels: str
    clean: float
    strengths: tuple[Strength, ...]
    lipschitz: float
    reason: str
    examples: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    columns = ("attack", "norm", "eps", "accuracy", "certified", "mean l2 move")

    def rows(self) -> list[Row]:
        """The clean accuracy, and one row per attack and eps."""
        clean: Row = ("clean", "", 0.0, self.clean, None if math.isnan(self.lipschitz) else self.clean, 0.0)
        return [
            clean,
            *(
                (s.adversary.scheme, s.norm, s.adversary.eps, s.accuracy, s.certified, s.mean_distance)
                for s in self.strengths
            ),
        ]

    def text(self) -> str:
        """The rows as a table, and what is certified."""
        lines = [self.tables()[""].text(), ""]
        if math.isfinite(self.lipschitz):
            lines.append(f"certified l2 Lipschitz constant: {self.lipschitz:.4g}")
        elif math.isinf(self.lipschitz):
            lines.append(f"nothing is certified: {self.reason}")
        return "\n".join(lines).rstrip()

    def _draw(self) -> Figure:
        attacks = list(dict.fromkeys((s.adversary.scheme, s.adversary.norm) for s in self.strengths))
        figure, axes = figures.panels(len(attacks))
        for axis, (scheme, norm) in zip(axes, attacks):
            members = [s for s in self.strengths if (s.adversary.scheme, s.adversary.norm) == (scheme, norm)]
            eps = [0.0, *(s.adversary.eps for s in members)]
            attacked = [self.clean, *(s.accuracy for s in members)]
            axis.plot(eps, figures.percent(attacked), label="under attack", **figures.series(0))
            if all(s.certified is not None for s in members):
                certified = [self.clean, *(s.certified for s in members)]
                axis.plot(eps, figures.percent(certified), label="certified", **figures.series(1))
            axis.set_xlabel(figures.eps_label(scheme, norm))
            figures.panel_title(axis, scheme.upper())
            figures.accuracy_axis(axis)
        figures.titled(figure, f"Accuracy of {self.images:,} images under attack, away from the {self.labels} labels")
        figures.legend_below(figure, axes)
        return figure


def attack_network(
    model: nn.Module,
    samples: Samples,
    adversaries: Sequence[Adversary],
    *,
    labels: str = "true",
    certify: bool = True,
    keep_examples: bool = False,
    progress: bool = False,
) -> AttackReport:
    """Attack every image, and count what is still right.

    Args:
        model: gives logits (B, classes); run in eval mode.
        samples: images on the device of the model.
        adversaries: attacks, each at one strength.
        labels: what the attacks move away from, "true" or "predicted" labels. The accuracy is that of the true ones.
        certify: bound the network's Lipschitz constant, and count the images that no perturbation within eps can change
            (an l_inf ball lies in the l2 ball that is sqrt(d) times as large, an l1 ball in that of its own radius; WRM
            has no ball).
        keep_examples: return the attacked images.

    Raises:
        OptionError: an argument is empty or out of range. UserError: the model does not take the images, or a logit is
            not finite.
    """
    check_samples(samples)
    if not adversaries:
        raise OptionError("adversaries", (), "give at least one")
    if labels not in ("true", "predicted"):
        raise OptionError("labels", labels, "choose true or predicted")
    model.eval()
    logits = _logits(model, samples)
    if int(samples.y.max()) >= logits.shape[1]:
        raise UserError(
            f"the images have the class {int(samples.y.max())}, and the model has {logits.shape[1]} logits: "
            "it is not of this data set"
        )
    right = logits.argmax(dim=1) == samples.y
    bound, reason, radius = math.nan, "", None
    if certify:
        report = lipschitz_bound(model, samples.x[:1])
        bound, reason = float(report.bound), report.reason
        if math.isfinite(bound):
            radius = torch.where(right, report.certified_radius(logits, samples.y), -1.0)
    strengths = []
    examples = {"x": samples.x.numpy(force=True), "y": samples.y.numpy(force=True)} if keep_examples else {}
    with progress_bar(progress, "attacking", len(adversaries) * len(samples)) as bar:
        for adversary in adversaries:
            correct, distance, moved = 0, 0.0, []
            for x, y in samples.batches(_BATCH_SIZE):
                x_adv = adversary.perturb(model, x, y if labels == "true" else None)
                correct += int((_logits(model, Samples(x_adv, y)).argmax(dim=1) == y).sum())
                distance += float((x_adv - x).flatten(1).double().norm(dim=1).sum())
                if keep_examples:
                    moved.append(x_adv.numpy(force=True))
                bar.update(len(y))
            if keep_examples:
                name = f"{adversary.scheme}_{adversary.norm}"
                short = f"{name}_{adversary.eps:g}"  # six digits may not tell two strengths apart
                examples[f"{name}_{adversary.eps!r}" if short in examples else short] = np.concatenate(moved)
            certified = None
            if radius is not None and (enclosing := _l2_radius(adversary, samples.x[0].numel())) is not None:
                certified = float((radius > enclosing).double().mean())
            strengths.append(Strength(adversary, correct / len(samples), certified, distance / len(samples)))
    clean = float(right.double().mean())
    return AttackReport(len(samples), labels, clean, tuple(strengths), bound, reason, examples)


def _l2_radius(adversary: Adversary, size: int) -> float | None:
    """Of the smallest l2 ball around the attack's; None where it has none."""
    if adversary.scheme == "wrm":
        return None
    return adversary.eps * (math.sqrt(size) * (1 + 1e-12) if adversary.norm == "inf" else 1.0)


def _logits(model: nn.Module, samples: Samples) -> torch.Tensor:
    try:
        with torch.no_grad():
            parts = [model(x) for x, _ in samples.batches(_BATCH_SIZE)]
    except Exception as error:  # the model's code is not ours
        shape = "x".join(map(str, samples.x.shape[1:]))
        raise UserError(f"the model does not take these images, of {shape} ({first_line(error)})") from error
    other = next((part for part in parts if not isinstance(part, torch.Tensor)), None)
    if other is not None:
        raise UserError(f"the model's output is a {type(other).__name__}; attacks need logits (B, classes)")
    logits = torch.cat(parts)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise UserError(f"the model's output has shape {tuple(logits.shape)}; attacks need logits (B, classes)")
    if not bool(logits.isfinite().all()):
        raise UserError("the model gives logits that are infinite or nan")
    return logits
