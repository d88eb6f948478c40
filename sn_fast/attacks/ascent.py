"""The loop of PGD: tensors in, tensors out, and no decision that depends on what they hold, so it can be captured."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import steps as ops
from ..ops.library import has_kernels
from ..reference.pgd_step import box
from .arguments import Amount, OneBound
from .gradient import Evaluation, Objective


class Region(NamedTuple):
    """Where the iterates may go, in tensors: radius and step per sample (B,), and the clip; None where numbers do."""

    eps: Tensor | None
    alpha: Tensor | None
    lower: Tensor | None
    upper: Tensor | None


@dataclass(frozen=True)
class Ascent:
    """``steps`` times ``pgd_step`` from each start, and what is kept of the iterates. See ``pgd`` for the options."""

    norm: str
    steps: int
    eps: float
    alpha: float
    targeted: bool
    early_stop: bool
    keep_best: bool
    several_starts: bool
    labels_at_x: bool
    """Predict labels at x first: they belong to x, and not to the start."""
    low: float | None
    high: float | None
    """The clip, where it is numbers."""

    def run(self, objective: Objective, x: Tensor, region: Region, starts: Iterable[Tensor]) -> Tensor:
        """x_adv."""
        if self.labels_at_x:
            objective.evaluate(x)
        ball = Amount(self.eps, region.eps)
        low: OneBound = self.low if region.lower is None else region.lower
        high: OneBound = self.high if region.upper is None else region.upper
        if self.norm == "inf" and not has_kernels(x.device):
            # Ball and clip are one box: made once, it saves the steps from making it again. A kernel reads x instead.
            low, high = box(x, ball.value, ball.per_sample, low, high)
            ball = Amount(math.inf)
        step = partial(
            ops.pgd_step,
            norm=self.norm,
            eps=ball.value,
            alpha=self.alpha,
            eps_per_sample=ball.per_sample,
            alpha_per_sample=region.alpha,
            lower=low,
            upper=high,
            targeted=self.targeted,
        )
        fooled_first = self.early_stop or self.several_starts
        best = _Best(objective, fooled_first) if self.keep_best or self.several_starts else None
        x_adv = x
        for x_adv in starts:
            active = None
            for _ in range(self.steps):
                gradient, evaluation = objective.gradient(x_adv)
                if best is not None and self.keep_best:
                    best.offer(x_adv, evaluation)
                if self.early_stop:
                    active = _still_active(active, objective, evaluation)
                x_adv = step(x_adv, x, gradient, active=active)
            if best is not None:
                x_adv = best.offer(x_adv, objective.evaluate(x_adv))
        return x_adv


def _still_active(active: Tensor | None, objective: Objective, evaluation: Evaluation) -> Tensor:
    fooled = objective.fooled(evaluation.logits)
    if fooled is None:
        raise ValueError(
            "early_stop needs class labels y of shape (B,) and logits of shape (B, classes), or predict=, a callable "
            "logits -> labels of the shape of y"
        )
    return ~fooled if active is None else active & ~fooled


class _Best:
    """Per sample, the best iterate so far: of highest loss (targeted: lowest), or first of all one that fools."""

    def __init__(self, objective: Objective, fooled_first: bool) -> None:
        self._objective = objective
        self._fooled_first = fooled_first
        self._x_adv: Tensor | None = None

    def offer(self, x_adv: Tensor, evaluation: Evaluation) -> Tensor:
        """Take each sample of x_adv that is better; return the best so far."""
        score = self._objective.score(evaluation)
        score = torch.where(score.isnan(), -math.inf, score)  # else the first NaN would win for good
        fooled = self._objective.fooled(evaluation.logits) if self._fooled_first else None
        if fooled is None:
            fooled = torch.zeros_like(score, dtype=torch.bool)
        if self._x_adv is None:
            self._x_adv, self._score, self._fooled = x_adv, score, fooled
            return x_adv
        better = torch.where(fooled == self._fooled, score > self._score, fooled)
        self._score = torch.where(better, score, self._score)
        self._fooled = fooled | self._fooled
        self._x_adv = torch.where(better.reshape(-1, *[1] * (x_adv.dim() - 1)), x_adv, self._x_adv)
        return self._x_adv
