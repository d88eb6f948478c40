"""Attacks: FGM, PGD and WRM, as functions and as objects that keep their options."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..ops import updates as ops
from ..reference.updates import box
from .arguments import (
    Amount,
    Bound,
    Clip,
    amount,
    bounds,
    canonical_norm,
    check_count,
    check_like,
    check_samples,
)
from .gradient import Evaluation, Loss, Model, Objective, prepared
from .steps import random_point

# x_adv, or (x_adv, AttackInfo) with return_info. A union of the two would make every typed caller narrow it.
Attacked = Tensor | Any


@dataclass(frozen=True)
class AttackInfo:
    """What an attack reached, taken in ``model_mode`` at the x_adv that it returned."""

    loss: Tensor
    """(B,): the loss of each sample at ``y`` (not negated if targeted)."""
    success: Tensor | None
    """(B,) bool: the model no longer predicts y (targeted: predicts y). None where y are no class labels."""
    y: Tensor | None
    """The labels attacked: those given, or the model's own predictions. None for an empty batch without labels."""
    gradients: int
    """How many gradients of the whole batch were taken."""


def fgm(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    norm: float | str = 2,
    eps: float | Tensor,
    loss: str | Loss = "ce",
    clip: Clip = None,
    targeted: bool = False,
    mean: Bound | None = None,
    std: Bound | None = None,
    model_mode: str = "eval",
    freeze_sn: bool = True,
    autocast_dtype: torch.dtype | None = None,
    return_info: bool = False,
) -> Attacked:
    """Fast gradient method: one step of length eps (Goodfellow et al. 2015; for 2 and 1 Farnia, Zhang, Tse 2019).

    That is ``pgd_step`` with alpha = eps and without a ball. Arguments, result and errors are those of ``pgd``, with a
    finite eps.
    """
    check_samples(x)
    order = canonical_norm(norm)
    radius = amount("eps", eps, x, finite=True, check_values=True)
    lower, upper = bounds(clip, x, check_values=True)
    with prepared(model, x, y, loss, targeted, mean, std, model_mode, freeze_sn, autocast_dtype) as (x, objective):
        x_adv = x
        if not _is_trivial(x, radius):
            gradient, _ = objective.gradient(x)
            x_adv = ops.pgd_step(
                x,
                x,
                gradient,
                norm=order,
                eps=math.inf,
                alpha=radius.value,
                eps_per_sample=None,
                alpha_per_sample=radius.per_sample,
                lower=lower,
                upper=upper,
                targeted=targeted,
                active=None,
            )
        return _result(x_adv, objective) if return_info else x_adv


def pgd(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    norm: float | str = 2,
    eps: float | Tensor,
    steps: int = 15,
    alpha: float | Tensor | None = None,
    random_start: bool = False,
    restarts: int = 1,
    targeted: bool = False,
    loss: str | Loss = "ce",
    clip: Clip = None,
    mean: Bound | None = None,
    std: Bound | None = None,
    early_stop: bool = False,
    keep_best: bool = False,
    x_init: Tensor | None = None,
    model_mode: str = "eval",
    freeze_sn: bool = True,
    autocast_dtype: torch.dtype | None = None,
    cuda_graph: bool = False,
    generator: torch.Generator | None = None,
    return_info: bool = False,
) -> Attacked:
    """Projected gradient method (Madry et al. 2018; the PGM of Farnia, Zhang, Tse 2019, whose defaults these are).

    ``steps`` times ``pgd_step`` from x: along the gradient of the loss, back into the ball around x, then into clip.
    x, parameters' ``.grad``, training flags and buffers of the model are left as they were, also if the model raises;
    the caller may be under no_grad or inference_mode.

    Args:
        model: gives logits (B, classes); a Module, or any callable, which then has no flags, buffers and sigmas.
        x: clean samples (B, *size), floating point.
        y: class labels (B,), or what a callable ``loss`` takes. None: the model's own predictions at x, held fixed.
        norm: inf, 2, 1 (the paper's radial l1) or "L1-exact"; also "Linf", "L2", "L1". See ``pgd_step``.
        eps: radius in the units of x; a number or one per sample (B,). 0 returns x; inf: no ball, and needs alpha.
        steps: number of gradients per restart.
        alpha: length of a step, as eps; None: 2 * eps / steps.
        random_start: start at a uniform point of the ball (``random_start``) instead of x; drawn with ``generator``.
        restarts: runs from that many random starts, and keeps per sample the best: one that fools before one that
            does not, then the higher loss (targeted: the lower).
        targeted: move towards y.
        loss: "ce" is cross entropy; or a callable (logits, y) -> (B,). Losses are summed, so a sample's gradient does
            not depend on its batch.
        clip: (lower, upper) in the units of x, numbers, C values, or tensors that broadcast to x. None: no limit.
        mean, std: the model is given (x - mean) / std, while x, eps, clip and the result stay as they are; a number, C
            values or a tensor; None: 0 and 1.
        early_stop: a sample that fools the model is not moved further. (Its gradients are still computed.)
        keep_best: return, per sample, the iterate of highest loss (targeted: lowest), the last one included, and with
            ``early_stop`` or ``restarts`` one that fools before one that does not. Costs one forward.
        x_init: where to start instead of x; (B, *size), brought into ball and clip first.
        model_mode: "eval", "train", or "keep" for the flags as they are; holds for every forward.
        freeze_sn: compute spectrally normalised weights once and not at every step (``frozen_sigma``).
        autocast_dtype: run the model under ``torch.autocast`` with torch.bfloat16 or torch.float16 (whose small
            gradients vanish). None: as the caller has it.
        cuda_graph: not in this version.
        generator: source of randomness of ``random_start``, on any device.
        return_info: return (x_adv, AttackInfo). Costs one forward.

    Returns:
        x_adv, a new tensor with the shape, dtype, device and layout of x; with ``return_info`` (x_adv, AttackInfo).

    Raises:
        ValueError: an argument out of range, an unknown name, or shapes or devices that do not fit.
        TypeError: an argument of the wrong type, such as an integer x.
        NotImplementedError: cuda_graph=True.
    """
    check_samples(x)
    order = canonical_norm(norm)
    steps, restarts = check_count("steps", steps), check_count("restarts", restarts)
    radius = amount("eps", eps, x, finite=alpha is None or random_start, check_values=True)
    stride = radius.scaled(2 / steps)
    if alpha is not None:
        stride = amount("alpha", alpha, x, finite=True, check_values=True)
    lower, upper = bounds(clip, x, check_values=True)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} would repeat the same run; set random_start=True")
    if x_init is not None:
        if random_start:
            raise ValueError("x_init and random_start=True both set the start; give one of them")
        check_like("x_init", x_init, x)
    if cuda_graph:
        raise NotImplementedError("cuda_graph=True needs the compiled CUDA core, which this version lacks; use False")

    with prepared(model, x, y, loss, targeted, mean, std, model_mode, freeze_sn, autocast_dtype) as (x, objective):
        if _is_trivial(x, radius):
            return _result(x, objective) if return_info else x
        if y is None and (random_start or x_init is not None):
            objective.evaluate(x)  # sets the labels, which belong to x and not to the start
        ball, low, high = radius, lower, upper
        if order == "inf":  # ball and clip are one box: made once, it saves the steps from making it again
            low, high = box(x, radius.value, radius.per_sample, lower, upper)
            ball = Amount(math.inf)
        step = partial(
            ops.pgd_step,
            norm=order,
            eps=ball.value,
            alpha=stride.value,
            eps_per_sample=ball.per_sample,
            alpha_per_sample=stride.per_sample,
            lower=low,
            upper=high,
            targeted=targeted,
        )
        best = _Best(objective, fooled_first=early_stop or restarts > 1) if keep_best or restarts > 1 else None
        for _ in range(restarts):
            x_adv = x
            if random_start:
                x_adv = random_point(x, order, radius, lower, upper, generator)
            elif x_init is not None:
                x_adv = ops.project(x_init, x, order, radius.value, radius.per_sample, lower, upper)
            active = None
            for _ in range(steps):
                gradient, evaluation = objective.gradient(x_adv)
                if best is not None and keep_best:
                    best.offer(x_adv, evaluation)
                if early_stop:
                    active = _still_active(active, objective, evaluation)
                x_adv = step(x_adv, x, gradient, active=active)
            if best is not None:
                x_adv = best.offer(x_adv, objective.evaluate(x_adv))
        return _result(x_adv, objective) if return_info else x_adv


def wrm(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    gamma: float | Tensor | None = None,
    eps: float | Tensor | None = None,
    steps: int = 15,
    loss: str | Loss = "ce",
    clip: Clip = None,
    targeted: bool = False,
    mean: Bound | None = None,
    std: Bound | None = None,
    model_mode: str = "eval",
    freeze_sn: bool = True,
    autocast_dtype: torch.dtype | None = None,
    return_info: bool = False,
) -> Attacked:
    """Wasserstein risk minimisation: ascent on loss(z) - gamma |z - x|_2^2 (Sinha, Namkoong, Duchi 2018).

    As published by Farnia, Zhang, Tse 2019: z = x + eps g first, then ``steps`` times ``wrm_step`` with step
    1 / sqrt(t + 2), t = 0, 1, ...: steps + 1 gradients. There is no ball: the price alone holds x_adv back, as it does
    where the Hessian of the loss stays below 2 gamma = 1 / eps.

    Args:
        gamma: > 0, the price of moving; a number or one per sample (B,). Give either gamma or eps.
        eps: 1 / (2 gamma), >= 0; 0 returns x.
        steps: number of steps after the first.
        model, x, y, loss, ..., return_info: as in ``pgd``.

    Returns, raises: as ``pgd``.
    """
    check_samples(x)
    check_count("steps", steps)
    radius = _wrm_eps(gamma, eps, x)
    lower, upper = bounds(clip, x, check_values=True)
    with prepared(model, x, y, loss, targeted, mean, std, model_mode, freeze_sn, autocast_dtype) as (x, objective):
        x_adv = x
        if not _is_trivial(x, radius):
            rate = radius.scaled(-1.0) if targeted else radius
            for step in (1.0, *(1 / math.sqrt(t + 2) for t in range(steps))):
                gradient, _ = objective.gradient(x_adv)
                x_adv = ops.wrm_step(x_adv, x, gradient, rate.value, rate.per_sample, step, lower, upper)
        return _result(x_adv, objective) if return_info else x_adv


class _Attack:
    """A model and the options of an attack. ``attack(x, y)`` and ``attack.perturb(x, y)`` give x_adv."""

    method: ClassVar[Callable[..., Attacked]]

    def __init__(self, model: Model, **options: Any) -> None:
        inspect.signature(self.method).bind(model, None, None, **options)  # a misspelt option fails here, not later
        self.model = model
        self.options = options

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Attacked:
        return self.method(self.model, x, y, **self.options)

    perturb = __call__

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({type(self.model).__name__}, {options})"


class FGM(_Attack):
    """``fgm`` with its options, for loops that take an attack object. Options: the keywords of ``fgm``."""

    method = staticmethod(fgm)


class PGD(_Attack):
    """``pgd`` with its options, for loops that take an attack object. Options: the keywords of ``pgd``."""

    method = staticmethod(pgd)


class WRM(_Attack):
    """``wrm`` with its options, for loops that take an attack object. Options: the keywords of ``wrm``."""

    method = staticmethod(wrm)


def _wrm_eps(gamma: float | Tensor | None, eps: float | Tensor | None, x: Tensor) -> Amount:
    if gamma is None and eps is not None:
        return amount("eps", eps, x, finite=True, check_values=True)
    if gamma is None or eps is not None:
        raise ValueError(f"give exactly one of gamma and eps = 1 / (2 gamma), got gamma={gamma!r}, eps={eps!r}")
    price = amount("gamma", gamma, x, finite=False, check_values=True)
    if price.per_sample is None:
        if price.value == 0:
            raise ValueError("gamma=0 must be > 0")
        return Amount(0.5 / price.value)
    if not bool(price.per_sample.all()):
        raise ValueError("gamma has elements that are 0; all must be > 0")
    return Amount(0.0, 0.5 / price.per_sample)


def _is_trivial(x: Tensor, radius: Amount) -> bool:
    """Nothing to attack: an empty batch, or eps = 0."""
    return x.shape[0] == 0 or (radius.per_sample is None and radius.value == 0)


def _still_active(active: Tensor | None, objective: Objective, evaluation: Evaluation) -> Tensor:
    fooled = objective.fooled(evaluation.logits)
    if fooled is None:
        raise ValueError("early_stop needs class labels y of shape (B,) and logits of shape (B, classes)")
    return ~fooled if active is None else active & ~fooled


def _result(x_adv: Tensor, objective: Objective) -> tuple[Tensor, AttackInfo]:
    if x_adv.shape[0] == 0:
        empty = torch.empty(0, device=x_adv.device)
        return x_adv, AttackInfo(empty, empty.bool(), objective.y, 0)
    losses, logits = objective.evaluate(x_adv)
    return x_adv, AttackInfo(losses, objective.fooled(logits), objective.y, objective.gradients)


class _Best:
    """Per sample, the best iterate so far: of highest loss (targeted: lowest), or first of all one that fools."""

    def __init__(self, objective: Objective, fooled_first: bool) -> None:
        self._objective = objective
        self._fooled_first = fooled_first
        self._x_adv: Tensor | None = None

    def offer(self, x_adv: Tensor, evaluation: Evaluation) -> Tensor:
        """Take each sample of x_adv that is better; return the best so far."""
        losses, logits = evaluation
        score = -losses if self._objective.targeted else losses
        score = torch.where(score.isnan(), -math.inf, score)  # else the first NaN would win for good
        fooled = self._objective.fooled(logits) if self._fooled_first else None
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
