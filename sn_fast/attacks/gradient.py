"""Gradient of a model's loss in its input, and the guard under which the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..normalization import frozen_sigma
from ..normalization.parametrization import SpectralNorm
from .arguments import Bound, normalisation
from .reading import Reading
from .task import LabelRange, Loss, Predict, Task
from .wrappers import flags, is_replicated, set_mode, unwrapped, without_reduction

Model = Callable[[Tensor], Tensor]

_NO_PATH = (
    "the loss does not depend on x in a way autograd can follow; does the model detach, or run a part of it (a frozen "
    "backbone) under torch.no_grad() or torch.inference_mode()? Freeze weights with requires_grad_(False) instead: an "
    "attack needs the gradient through all layers, and leaves parameters alone"
)
_ERRORS_OF_BACKWARD = ("modified by an inplace operation", "derivative for")
_ERRORS_WITHOUT_PATH = (
    "nference tensor",
    "numpy() on Tensor that requires grad",
)  # torch's, in a forward that detaches


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
                set_mode(model, model_mode)
            # Weights frozen on one device would be of no use to replicas on others.
            freeze = freeze_sn and not is_replicated(model)
            with without_reduction(model), frozen_sigma(model) if freeze else nullcontext():
                yield


@contextmanager
def _restored(model: nn.Module, replayed: bool) -> Iterator[None]:
    modes = flags(model)
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
        for module, training in modes:
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
        training = getattr(self.module, "training", False)
        if self.buffer._version != self.version or training or replayed:
            self.buffer.copy_(self.value)


class Evaluation(NamedTuple):
    """Per-sample losses (B,) and logits at some x_adv, detached."""

    losses: Tensor
    logits: Tensor


def _backward(climbed: Tensor, leaf: Tensor, pull: Tensor | None) -> Tensor | None:
    try:
        return torch.autograd.grad(climbed, leaf, pull, allow_unused=True)[0]
    except RuntimeError as error:
        if any(phrase in str(error) for phrase in _ERRORS_OF_BACKWARD):
            raise ValueError(
                f"the model's gradient in x cannot be taken ({error}); if the model was exported or traced in training "
                "mode, do so with model.eval()"
            ) from error
        raise


class Objective:
    """What an attack climbs: the loss of ``model`` at labels ``y``, as a function of x_adv in x's own space.

    Without labels those of the first evaluation are predicted and kept, so an attack that starts at x needs no extra
    forward for them. Use inside ``guarded``.

    Args:
        known: the range of y, where the host knows it.
        scale_free: only the directions of the samples' gradients matter: they are then those of a loss that has not
            saturated (``Task.losses_and_pull``).
        decides: the model's decisions will be needed: what is missing for them is an error of the first forward.
    """

    def __init__(
        self,
        model: Model,
        y: Tensor | None,
        *,
        task: Task,
        targeted: bool,
        mean: Tensor | None,
        std: Tensor | None,
        autocast_dtype: torch.dtype | None,
        known: LabelRange | None = None,
        scale_free: bool = False,
        decides: bool = False,
    ) -> None:
        self.model = model
        self.task = task
        self.mean, self.std = mean, std
        self.y = y
        self.targeted = targeted
        self.gradients = 0
        self._autocast_dtype = autocast_dtype
        self._known = known or LabelRange()
        self._scale_free = scale_free
        self._decides = decides
        self.classes: int | None = None
        """Columns of the logits, known after the first forward."""
        self._is_checked = False

    def at(self, y: Tensor | None, mean: Tensor | None, std: Tensor | None) -> Objective:
        """The same objective with other tensors."""
        return Objective(
            self.model,
            y,
            task=self.task,
            targeted=self.targeted,
            mean=mean,
            std=std,
            autocast_dtype=self._autocast_dtype,
            known=self._known,
            scale_free=self._scale_free,
            decides=self._decides,
        )

    @property
    def options(self) -> tuple[Hashable, ...]:
        """What makes the objective, apart from the model and the tensors."""
        return self.task, self.targeted, self._autocast_dtype, self._scale_free

    def gradient(self, x_adv: Tensor) -> tuple[Tensor, Evaluation]:
        """Gradient of the summed losses in x_adv, with what the forward gave. Parameters collect nothing."""
        with torch.enable_grad():
            leaf = x_adv.detach().requires_grad_()
            logits, y = self._forward(leaf)
            climbed, pull, gradient = logits, None, None
            if self._scale_free and not callable(self.task.loss):
                losses, pull = self.task.losses_and_pull(logits.detach(), y)
            else:
                losses = self._losses(logits, y)
                climbed = losses.sum()  # not the mean: a sample's gradient must not depend on the batch it is in
            if climbed.requires_grad:
                gradient = _backward(climbed, leaf, pull)
            if gradient is None:
                raise ValueError(_NO_PATH)
        self.gradients += 1
        return gradient, Evaluation(losses.detach(), logits.detach())

    def evaluate(self, x_adv: Tensor) -> Evaluation:
        """Losses and logits without a gradient."""
        # Without a gradient autograd does not stop a model that works in place on its input; a copy keeps x_adv.
        logits, y = self._forward(x_adv.clone())
        return Evaluation(self._losses(logits, y), logits)

    def fooled(self, logits: Tensor) -> Tensor | None:
        """(B,): the prediction is not y (targeted: it is y). None where y are no class labels."""
        return None if self.y is None else self.task.fooled(logits, self.y, self.targeted)

    def score(self, evaluation: Evaluation) -> Tensor:
        """What orders iterates as their losses do, the better the higher, (B,)."""
        assert self.y is not None
        score = self.task.score(evaluation.logits, self.y, evaluation.losses)
        return -score if self.targeted else score

    def check_classes(self, classes: int | None) -> None:
        """Labels that are to be columns of the logits are."""
        if classes is not None and (self.task.loss == "ce" or self._decides):
            self.task.check_range(classes, self._known)

    def _forward(self, x_adv: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the labels, which the first forward may have to find."""
        inputs = x_adv
        if self.mean is not None:
            inputs = inputs - self.mean
        if self.std is not None:
            inputs = inputs / self.std
        dtype = self._autocast_dtype
        try:
            with nullcontext() if dtype is None else torch.autocast(x_adv.device.type, dtype=dtype):
                logits = self.model(inputs)
        except RuntimeError as error:
            if torch.is_grad_enabled() and any(phrase in str(error) for phrase in _ERRORS_WITHOUT_PATH):
                raise ValueError(f"{_NO_PATH} (torch: {error})") from error
            raise
        if not isinstance(logits, Tensor):
            raise TypeError(f"the model must return a tensor of logits, got {type(logits).__name__}; wrap the model")
        self.task.check_logits(logits, x_adv)
        if self.y is None:
            self.y = self.task.labels(logits.detach())
        if not self._is_checked:
            self.classes = logits.shape[1] if logits.dim() == 2 else None
            if self._decides:
                self.fooled(logits.detach())
            self.check_classes(self.classes)
            self._is_checked = True
        return logits, self.y

    def _losses(self, logits: Tensor, y: Tensor) -> Tensor:
        losses = self.task.losses(logits, y)
        if not isinstance(losses, Tensor) or losses.shape != logits.shape[:1]:
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"the loss must have one value per sample, shape ({logits.shape[0]},), got {found}; "
                "use reduction='none'"
            )
        return losses


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
    *,
    predict: Predict | None = None,
    reading: Reading | None = None,
    scale_free: bool = False,
    decides: bool = False,
) -> Iterator[tuple[Tensor, Objective]]:
    """The guarded model's objective, and a copy of x, so that nothing reaches the caller's.

    ``reading``: what else of the arguments is to be read from the device and judged first.
    """
    if not callable(model):
        raise TypeError(f"model must be callable, got {type(model).__name__}")
    task = Task(loss, predict)
    if model_mode not in ("eval", "train", "keep"):
        raise ValueError(f'model_mode={model_mode!r} is unknown; choose "eval", "train" or "keep"')
    if autocast_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast_dtype={autocast_dtype!r} must be torch.bfloat16, torch.float16 or None")
    if y is None and targeted:
        raise ValueError("targeted=True needs y, the labels to reach")
    reading = reading or Reading(x)
    known = None if y is None else task.check_labels(y, x, reading)
    mean, std = normalisation(mean, std, x, reading)
    reading.finish()
    model = unwrapped(model)
    with guarded(model, model_mode, freeze_sn, replayed):
        # Autograd refuses a caller's inference tensors; clones made in here are ordinary tensors.
        y, mean, std = (None if t is None else t.clone() for t in (y, mean, std))
        yield (
            x.clone(),
            Objective(
                model,
                y,
                task=task,
                targeted=targeted,
                mean=mean,
                std=std,
                autocast_dtype=autocast_dtype,
                known=known,
                scale_free=scale_free,
                decides=decides,
            ),
        )
