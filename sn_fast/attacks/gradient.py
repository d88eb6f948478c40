"""Gradient of a model's loss in its input, and the guard under which the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..normalization import frozen_sigma
from ..normalization.parametrization import SpectralNorm
from ..reference.linear_map import compute_dtype
from .arguments import Bound, check_labels, normalisation

Model = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@contextmanager
def guarded(model: Model, model_mode: str, freeze_sn: bool, replayed: bool) -> Iterator[None]:
    """Autograd is off inside, modules are in ``model_mode``, and normalised weights are computed once if ``freeze_sn``.

    On leaving, also by an exception, every module has its training flag and its buffers back; ``replayed``: from a CUDA
    graph, which tells no tensor that it writes to it.
    """
    # A caller's inference mode would forbid the gradients that enable_grad is to allow later on.
    with torch.inference_mode(False), torch.no_grad():
        if not isinstance(model, nn.Module):
            yield
            return
        with _restored(model, replayed):
            if model_mode != "keep":
                model.train(model_mode == "train")
            with frozen_sigma(model) if freeze_sn else nullcontext():
                yield


@contextmanager
def _restored(model: nn.Module, replayed: bool) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        _SavedBuffer(module, name, buffer, buffer.clone(), buffer._version)
        for module in model.modules()
        # u, v and sigma belong to the raw weight: they move only where that has moved before the attack, and must then.
        if not isinstance(module, SpectralNorm)
        for name, buffer in module.named_buffers(recurse=False)
        # A lazy buffer may get its shape inside; an inference tensor cannot change outside inference mode.
        if not nn.parameter.is_lazy(buffer) and not buffer.is_inference()
    ]
    try:
        yield
    finally:
        for saved in buffers:
            saved.restore(replayed)
        for module, training in flags:
            module.training = training  # train() may be overridden, and would reach the submodules


class _SavedBuffer(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor
    value: Tensor
    version: int

    def restore(self, replayed: bool) -> None:
        """Writes only what may have changed: a write bumps the version, which others may watch."""
        if getattr(self.module, self.name, None) is not self.buffer:
            setattr(self.module, self.name, self.buffer)
        # In training batch_norm updates its running statistics without bumping their versions.
        if self.buffer._version != self.version or self.module.training or replayed:
            self.buffer.copy_(self.value)


class Evaluation(NamedTuple):
    """Per-sample losses (B,) and logits at some x_adv, detached."""

    losses: Tensor
    logits: Tensor


class Objective:
    """What an attack climbs: the loss of ``model`` at labels ``y``, as a function of x_adv in x's own space.

    Without labels those of the first evaluation are predicted and kept, so an attack that starts at x needs no extra
    forward for them. Use inside ``guarded``.
    """

    def __init__(
        self,
        model: Model,
        y: Tensor | None,
        *,
        loss: str | Loss,
        targeted: bool,
        mean: Tensor | None,
        std: Tensor | None,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self._model = model
        self._loss = cross_entropy if isinstance(loss, str) else loss
        self.mean, self.std = mean, std
        self._autocast_dtype = autocast_dtype
        self.y = y
        self.targeted = targeted
        self.gradients = 0

    def at(self, y: Tensor | None, mean: Tensor | None, std: Tensor | None) -> Objective:
        """The same objective with other tensors."""
        dtype = self._autocast_dtype
        return Objective(
            self._model, y, loss=self._loss, targeted=self.targeted, mean=mean, std=std, autocast_dtype=dtype
        )

    @property
    def options(self) -> tuple[Hashable, ...]:
        """What makes the objective, apart from the model and the tensors."""
        return self._loss, self.targeted, self._autocast_dtype

    def gradient(self, x_adv: Tensor) -> tuple[Tensor, Evaluation]:
        """Gradient of the summed losses in x_adv, with what the forward gave. Parameters collect nothing."""
        with torch.enable_grad():
            leaf = x_adv.detach().requires_grad_()
            losses, logits = self._forward(leaf)
            if not losses.requires_grad:
                raise ValueError("the loss does not depend on x in a way autograd can follow; does the model detach?")
            # Summed, not averaged: a sample's gradient must not depend on the batch it is in.
            (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        self.gradients += 1
        return gradient, Evaluation(losses.detach(), logits.detach())

    def evaluate(self, x_adv: Tensor) -> Evaluation:
        """Losses and logits without a gradient."""
        # Without a gradient autograd does not stop a model that works in place on its input; a copy keeps x_adv.
        return Evaluation(*self._forward(x_adv.clone()))

    def fooled(self, logits: Tensor) -> Tensor | None:
        """(B,): the prediction is not y (targeted: it is y). None where y are no class labels."""
        y = self.y
        if y is None or y.dtype.is_floating_point or y.dim() != 1 or logits.dim() != 2:
            return None
        prediction = logits.argmax(dim=1)
        return prediction == y if self.targeted else prediction != y

    def _forward(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        inputs = x_adv
        if self.mean is not None:
            inputs = inputs - self.mean
        if self.std is not None:
            inputs = inputs / self.std
        dtype = self._autocast_dtype
        with nullcontext() if dtype is None else torch.autocast(x_adv.device.type, dtype=dtype):
            logits = self._model(inputs)
        if not isinstance(logits, Tensor):
            raise TypeError(f"the model must return a tensor of logits, got {type(logits).__name__}; wrap the model")
        if self.y is None:
            if logits.dim() != 2:
                raise ValueError(f"y=None needs logits of shape (B, classes), got {tuple(logits.shape)}; pass y")
            self.y = logits.detach().argmax(dim=1)
        losses = self._loss(logits, self.y)
        if losses.shape != x_adv.shape[:1]:
            raise ValueError(
                f"the loss must have one value per sample, shape ({x_adv.shape[0]},), got {tuple(losses.shape)}; "
                "use reduction='none'"
            )
        return losses, logits


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross entropy per sample, in float32 at least."""
    if logits.dim() != 2:
        raise ValueError(
            f"loss='ce' needs logits of shape (B, classes), got {tuple(logits.shape)}; pass a callable loss"
        )
    return F.cross_entropy(logits.to(compute_dtype(logits)), y.long(), reduction="none")


@contextmanager
def prepared(
    model: Model,
    x: Tensor,
    y: Tensor | None,
    loss: str | Loss,
    targeted: bool,
    mean: Bound | None,
    std: Bound | None,
    model_mode: str,
    freeze_sn: bool,
    autocast_dtype: torch.dtype | None,
    replayed: bool = False,
) -> Iterator[tuple[Tensor, Objective]]:
    """The guarded model's objective, and a copy of x, so that nothing reaches the caller's."""
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    if isinstance(loss, str) and loss != "ce":
        raise ValueError(
            f'loss={loss!r} is unknown; choose "ce" or give a callable (logits, y) -> Tensor of shape (B,)'
        )
    if model_mode not in ("eval", "train", "keep"):
        raise ValueError(f'model_mode={model_mode!r} is unknown; choose "eval", "train" or "keep"')
    if autocast_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast_dtype={autocast_dtype!r} must be torch.bfloat16, torch.float16 or None")
    if y is None and targeted:
        raise ValueError("targeted=True needs y, the labels to reach")
    if y is not None:
        check_labels(y, x, class_indices=isinstance(loss, str))
    mean, std = normalisation(mean, std, x)
    with guarded(model, model_mode, freeze_sn, replayed):
        # Autograd refuses a caller's inference tensors; clones made in here are ordinary tensors.
        y, mean, std = (None if t is None else t.clone() for t in (y, mean, std))
        objective = Objective(model, y, loss=loss, targeted=targeted, mean=mean, std=std, autocast_dtype=autocast_dtype)
        yield x.clone(), objective
