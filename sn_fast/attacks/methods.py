"""Attacks: FGM, PGD and WRM."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ..normalization import frozen_sigma
from ..normalization.parametrization import refresh
from ..ops import steps as ops
from . import graph
from .arguments import (
    Amount,
    Bound,
    Clip,
    Norm,
    OneBound,
    amount,
    bounds,
    canonical_norm,
    check_count,
    check_like,
    check_samples,
    check_within,
    refusal_unless,
)
from .ascent import Ascent, Region
from .gradient import Model, Objective, prepared
from .options import FGMOptions, LossName, ModelMode, PGDOptions, WRMOptions
from .reading import Reading
from .steps import random_point
from .task import Loss, Predict
from .wrappers import is_replicated, unwrapped

Attacked = Tensor | tuple[Tensor, "AttackInfo"]


@dataclass(frozen=True)
class AttackInfo:
    """What an attack reached, taken in ``model_mode`` at the x_adv that it returned."""

    loss: Tensor
    """(B,): the loss of each sample at ``y`` (not negated if targeted)."""
    success: Tensor | None
    """(B,) bool: the model no longer decides for y (targeted: decides for y), by ``predict`` where it was given. None
    where y are no class labels."""
    y: Tensor | None
    """The labels attacked: those given, or the model's own predictions. None for an empty batch without labels."""
    gradients: int
    """How many gradients of the whole batch were taken."""


@overload
def fgm(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[FGMOptions],
) -> Tensor: ...
@overload
def fgm(
    model: Model, x: Tensor, y: Tensor | None = None, *, return_info: Literal[True], **options: Unpack[FGMOptions]
) -> tuple[Tensor, AttackInfo]: ...
def fgm(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    norm: Norm = 2,
    eps: float | Tensor,
    loss: LossName | Loss = "ce",
    predict: Predict | None = None,
    clip: Clip = None,
    targeted: bool = False,
    mean: Bound | None = None,
    std: Bound | None = None,
    model_mode: ModelMode = "eval",
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
    reading = Reading(x)
    radius = amount("eps", eps, x, finite=True, reading=reading)
    lower, upper = _checked_bounds(clip, x, reading)
    settings = loss, targeted, mean, std, model_mode, freeze_sn, autocast_dtype
    options: dict[str, Any] = {"predict": predict, "reading": reading, "decides": return_info}
    with prepared(model, x, y, *settings, **options, scale_free=True) as (x, objective):
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


@overload
def pgd(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[PGDOptions],
) -> Tensor: ...
@overload
def pgd(
    model: Model, x: Tensor, y: Tensor | None = None, *, return_info: Literal[True], **options: Unpack[PGDOptions]
) -> tuple[Tensor, AttackInfo]: ...
def pgd(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    norm: Norm = 2,
    eps: float | Tensor,
    steps: int = 15,
    alpha: float | Tensor | None = None,
    random_start: bool = False,
    restarts: int = 1,
    targeted: bool = False,
    loss: LossName | Loss = "ce",
    predict: Predict | None = None,
    clip: Clip = None,
    mean: Bound | None = None,
    std: Bound | None = None,
    early_stop: bool = False,
    keep_best: bool = False,
    x_init: Tensor | None = None,
    model_mode: ModelMode = "eval",
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
        model: gives logits (B, classes), or with one logit (B, 1) or (B,); a Module, or any callable, which then has
            no flags, buffers and sigmas. DistributedDataParallel is attacked as its module, wherever it stands: a
            forward of its own would be a step of training. Other wrappers are called as they are.
        x: clean samples (B, *size), floating point, within ``clip``.
        y: class labels (B,), or what a callable ``loss`` takes. None: the model's own predictions at x, held fixed.
        norm: inf, 2, 1 (the paper's radial l1) or "L1-exact"; also "Linf", "L2", "L1". See ``pgd_step``.
        eps: radius in the units of x; a number or one per sample (B,). 0 returns x; inf: no ball, and needs alpha.
        steps: number of gradients per restart.
        alpha: length of a step, as eps; None: 2 * eps / steps.
        random_start: start at a uniform point of the ball (``random_start``) instead of x; drawn with ``generator``.
        restarts: runs from that many random starts, and keeps per sample the best: one that fools before one that
            does not, then the higher loss (targeted: the lower).
        targeted: move towards y.
        loss: "ce" is cross entropy; "bce" binary cross entropy of one logit, y 0 or 1; or a callable
            (logits, y) -> (B,). Losses are summed, so a sample's gradient does not depend on its batch. Where "ce" and
            "bce" saturate, because the model is sure of y, the step still has the direction of their exact gradient,
            and ``keep_best`` and ``restarts`` compare the odds.
        predict: logits -> labels (B,), by which success, ``early_stop``, ``restarts`` and y=None go. None: the argmax
            of the columns, and with loss="bce" whether the logit is > 0.
        clip: (lower, upper) in the units of x, numbers, C values, tensors that broadcast to x, or None on a side
            without a limit. None: no limit.
        mean, std: the model is given (x - mean) / std, while x, eps, clip and the result stay as they are; a number, C
            values or a tensor; None: 0 and 1.
        early_stop: a sample that fools the model is not moved further. (Its gradients are still computed.)
        keep_best: return, per sample, the iterate of highest loss (targeted: lowest), the last one included, and with
            ``early_stop`` or ``restarts`` one that fools before one that does not. Costs one forward.
        x_init: where to start instead of x; (B, *size), brought into ball and clip first.
        model_mode: "eval", "train", or "keep" for the flags as they are; holds for every forward. The mode of exported
            models and frozen scripts is part of their code: another one is refused.
        freeze_sn: compute spectrally normalised weights once and not at every step (``frozen_sigma``).
        autocast_dtype: run the model under ``torch.autocast`` with torch.bfloat16 or torch.float16 (in which the small
            gradients of a callable loss vanish). None: as the caller has it.
        cuda_graph: run the whole loop as one CUDA graph, captured at the first call with these shapes and options and
            replayed as long as they, the model's memory and its training flags stay. For small models and batches,
            where launches take longer than the work; the model must do the same operations at every call, and its
            forward is not run by Python in a replay (hooks do not fire). A graph keeps its memory as long as the model
            lives; the last 4 are kept.
        generator: source of randomness of ``random_start``, on any device.
        return_info: return (x_adv, AttackInfo). Costs one forward.

    Returns:
        x_adv, a new tensor with the shape, dtype, device and layout of x; with ``return_info`` (x_adv, AttackInfo).

    Raises:
        ValueError: an argument out of range, an unknown name, or shapes or devices that do not fit; labels that are no
            classes; x outside clip by more than rounding, so for instance normalised without ``mean`` and ``std``; a
            loss without a gradient in x. Values inside tensors are read once, before the first step; not in compiled
            code, nor where the caller captures a CUDA graph.
        TypeError: an argument of the wrong type, such as an integer x.
        RuntimeError: cuda_graph=True, and the model or loss cannot be captured.
    """
    check_samples(x)
    order = canonical_norm(norm)
    steps, restarts = check_count("steps", steps), check_count("restarts", restarts)
    reading = Reading(x)
    radius = amount("eps", eps, x, finite=alpha is None or random_start, reading=reading)
    stride = radius.scaled(2 / steps)
    if alpha is not None:
        stride = amount("alpha", alpha, x, finite=True, reading=reading)
    lower, upper = _checked_bounds(clip, x, reading)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts={restarts} would repeat the same run; set random_start=True")
    if x_init is not None:
        if random_start:
            raise ValueError("x_init and random_start=True both set the start; give one of them")
        check_like("x_init", x_init, x)
    ascent = Ascent(
        norm=order,
        steps=steps,
        eps=radius.value,
        alpha=stride.value,
        targeted=targeted,
        early_stop=early_stop,
        keep_best=keep_best,
        several_starts=restarts > 1,
        labels_at_x=y is None and (random_start or x_init is not None),
        low=lower if isinstance(lower, float) else None,
        high=upper if isinstance(upper, float) else None,
    )
    region = Region(
        radius.per_sample, stride.per_sample, *(b if isinstance(b, Tensor) else None for b in (lower, upper))
    )
    if cuda_graph:
        _check_graph(model, x)
    # In a graph normalised weights are part of what is captured: they must not be frozen before.
    freeze = freeze_sn and not cuda_graph
    settings = loss, targeted, mean, std, model_mode, freeze, autocast_dtype, cuda_graph
    decides = return_info or early_stop or restarts > 1
    options: dict[str, Any] = {"predict": predict, "reading": reading, "decides": decides}
    with prepared(model, x, y, *settings, **options, scale_free=True) as (x, objective):
        if _is_trivial(x, radius):
            return _result(x, objective) if return_info else x

        def starts() -> Iterator[Tensor]:
            for _ in range(restarts):
                if random_start:
                    yield random_point(x, order, radius, lower, upper, generator)
                elif x_init is not None:
                    yield ops.project(x_init, x, order, radius.value, radius.per_sample, lower, upper)
                else:
                    yield x

        if cuda_graph:
            return _graphed(ascent, objective, x, region, list(starts()), freeze_sn, return_info)
        x_adv = ascent.run(objective, x, region, starts())
        return _result(x_adv, objective) if return_info else x_adv


def _check_graph(model: Model, x: Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"cuda_graph=True needs a torch.nn.Module, got {type(model).__name__}; wrap it, or use False")
    if x.device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs x on a CUDA device, got {x.device}; use cuda_graph=False")
    if is_replicated(unwrapped(model)):
        raise ValueError("cuda_graph=True is for one device, and DataParallel uses several: attack model.module")


def _graphed(
    ascent: Ascent,
    objective: Objective,
    x: Tensor,
    region: Region,
    starts: list[Tensor],
    freeze_sn: bool,
    return_info: bool,
) -> Attacked:
    """``ascent`` by a CUDA graph. Sigma is refreshed before it; normalised weights are computed in it, once."""
    model = objective.model
    assert isinstance(model, nn.Module)
    refresh(model)

    def loop(tensors: graph.Tensors, notes: graph.Notes) -> graph.Tensors:
        x, y, mean, std, *rest = tensors
        assert x is not None
        static = objective.at(y, mean, std)
        device = x.device.type
        uncached = torch.autocast(
            device,
            dtype=torch.get_autocast_dtype(device),
            enabled=torch.is_autocast_enabled(device),
            cache_enabled=False,  # cast weights must be captured, not taken from before
        )
        with uncached, frozen_sigma(model) if freeze_sn else nullcontext():
            first = [t for t in rest[4:] if t is not None]
            x_adv = ascent.run(static, x, Region(*rest[:4]), first)
            if static.classes is not None:
                notes["classes"] = static.classes
            if not return_info:
                return [x_adv]
            losses, logits = static.evaluate(x_adv)
            return [x_adv, losses, static.fooled(logits), static.y]

    tensors = [x, objective.y, objective.mean, objective.std, *region, *starts]
    options = ascent, objective.options, freeze_sn, return_info
    x_adv, *info = graph.run(model, options, loop, tensors, lambda notes: objective.check_classes(notes.get("classes")))
    assert x_adv is not None
    if not return_info:
        return x_adv
    losses, fooled, y = info
    assert losses is not None
    return x_adv, AttackInfo(losses, fooled, y, ascent.steps * len(starts))


@overload
def wrm(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    return_info: Literal[False] = False,
    **options: Unpack[WRMOptions],
) -> Tensor: ...
@overload
def wrm(
    model: Model, x: Tensor, y: Tensor | None = None, *, return_info: Literal[True], **options: Unpack[WRMOptions]
) -> tuple[Tensor, AttackInfo]: ...
def wrm(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    gamma: float | Tensor | None = None,
    eps: float | Tensor | None = None,
    steps: int = 15,
    loss: LossName | Loss = "ce",
    predict: Predict | None = None,
    clip: Clip = None,
    targeted: bool = False,
    mean: Bound | None = None,
    std: Bound | None = None,
    model_mode: ModelMode = "eval",
    freeze_sn: bool = True,
    autocast_dtype: torch.dtype | None = None,
    return_info: bool = False,
) -> Attacked:
    """Wasserstein risk minimisation: ascent on loss(z) - gamma |z - x|_2^2 (Sinha, Namkoong, Duchi 2018).

    As published by Farnia, Zhang, Tse 2019: z = x + eps g first, then ``steps`` times ``wrm_step`` with step
    1 / sqrt(t + 2), t = 0, 1, ...: steps + 1 gradients. There is no ball: the price alone holds x_adv back, as it does
    where the Hessian of the loss stays below 2 gamma = 1 / eps. Steps are in proportion to the gradient itself, so a
    sample of which the model is sure hardly moves, and in low precision not at all.

    Args:
        gamma: > 0, the price of moving; a number or one per sample (B,). Give either gamma or eps.
        eps: 1 / (2 gamma), >= 0; 0 returns x.
        steps: number of steps after the first.
        model, x, y, loss, ..., return_info: as in ``pgd``.

    Returns, raises: as ``pgd``.
    """
    check_samples(x)
    check_count("steps", steps)
    reading = Reading(x)
    radius = _wrm_eps(gamma, eps, x, reading)
    lower, upper = _checked_bounds(clip, x, reading)
    settings = loss, targeted, mean, std, model_mode, freeze_sn, autocast_dtype
    options: dict[str, Any] = {"predict": predict, "reading": reading, "decides": return_info}
    with prepared(model, x, y, *settings, **options) as (x, objective):
        x_adv = x
        if not _is_trivial(x, radius):
            rate = radius.scaled(-1.0) if targeted else radius
            for step in (1.0, *(1 / math.sqrt(t + 2) for t in range(steps))):
                gradient, _ = objective.gradient(x_adv)
                x_adv = ops.wrm_step(x_adv, x, gradient, rate.value, rate.per_sample, step, lower, upper)
        return _result(x_adv, objective) if return_info else x_adv


def _checked_bounds(clip: Clip, x: Tensor, reading: Reading) -> tuple[OneBound, OneBound]:
    lower, upper = bounds(clip, x, reading)
    check_within(x, clip, lower, upper, reading)
    return lower, upper


def _wrm_eps(gamma: float | Tensor | None, eps: float | Tensor | None, x: Tensor, reading: Reading) -> Amount:
    if gamma is None and eps is not None:
        return amount("eps", eps, x, finite=True, reading=reading)
    if gamma is None or eps is not None:
        raise ValueError(f"give exactly one of gamma and eps = 1 / (2 gamma), got gamma={gamma!r}, eps={eps!r}")
    price = amount("gamma", gamma, x, finite=False, reading=reading)
    if price.per_sample is None:
        if price.value == 0:
            raise ValueError("gamma=0 must be > 0")
        return Amount(0.5 / price.value)
    reading.expect(refusal_unless("gamma has elements that are 0; all must be > 0"), price.per_sample.all())
    return Amount(0.0, 0.5 / price.per_sample)


def _is_trivial(x: Tensor, radius: Amount) -> bool:
    """Nothing to attack: an empty batch, or eps = 0."""
    return x.shape[0] == 0 or (radius.per_sample is None and radius.value == 0)


def _result(x_adv: Tensor, objective: Objective) -> tuple[Tensor, AttackInfo]:
    if x_adv.shape[0] == 0:
        empty = torch.empty(0, device=x_adv.device)
        return x_adv, AttackInfo(empty, empty.bool(), objective.y, 0)
    losses, logits = objective.evaluate(x_adv)
    return x_adv, AttackInfo(losses, objective.fooled(logits), objective.y, objective.gradients)
