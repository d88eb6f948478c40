"""What an attack is against: a loss, and the rule by which logits decide on labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.linear_map import compute_dtype
from .arguments import check_per_sample
from .reading import Reading

Loss = Callable[[Tensor, Tensor], Tensor]
Predict = Callable[[Tensor], Tensor]

_INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_SATURATED = 2.0**-6  # where 1 - p(y) falls below, softmax - onehot has lost digits by cancellation


class LabelError(ValueError, TypeError):
    """Labels of a dtype that a loss does not take: wrong in value as in type."""


@dataclass
class LabelRange:
    """The smallest and the largest label, where they are known on the host."""

    smallest: float | None = None
    largest: float | None = None


@dataclass(frozen=True)
class Task:
    """``loss`` is "ce", "bce" or a callable; ``predict`` takes the place of the rule that goes with it."""

    loss: str | Loss
    predict: Predict | None = None

    def __post_init__(self) -> None:
        if self.loss not in ("ce", "bce") and not callable(self.loss):
            raise ValueError(
                f'loss={self.loss!r} is unknown; choose "ce" or give a callable (logits, y) -> Tensor of shape (B,); '
                '"bce" is for models with one logit'
            )
        if self.predict is not None and not callable(self.predict):
            raise TypeError(f"predict must be a callable logits -> labels (B,), got {type(self.predict).__name__}")

    # -- labels -------------------------------------------------------------------------------------------------------

    def check_labels(self, y: Tensor, x: Tensor, reading: Reading) -> LabelRange:
        """y are labels of this task; its range is known, and judged, when ``reading`` is finished."""
        known = LabelRange()
        if callable(self.loss):
            if not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]:
                raise ValueError(f"y must be a tensor with one entry for each of the {x.shape[0]} samples of x")
            if y.dim() != 1 or y.dtype not in _INDEX_DTYPES or self.predict is not None:
                return known
        else:
            check_per_sample("y", y, x)
            if self.loss == "ce" and y.dtype not in _INDEX_DTYPES:
                raise LabelError(
                    f"y must hold class indices, got {y.dtype}; convert it with y.long(), or give a callable loss"
                )
            if self.loss == "bce" and y.dtype.is_complex:
                raise LabelError(f"y must hold labels 0 and 1, got {y.dtype}")
        if y.numel() == 0:
            return known

        def judge(smallest: float, largest: float, all_binary: float) -> None:
            known.smallest, known.largest = smallest, largest
            if self.loss == "ce" and smallest < 0:
                raise ValueError(
                    f"y has the label {smallest:.0f}, must hold class indices >= 0; there is no ignore_index: leave "
                    "those samples out"
                )
            if self.loss == "bce" and not all_binary:
                raise ValueError(
                    f"y has values from {smallest:g} to {largest:g}; loss='bce' needs labels 0 and 1 (for labels ±1: "
                    "(y + 1) / 2), or give a callable loss with predict="
                )

        binary = ((y == 0) | (y == 1)).all()
        reading.expect(judge, *(y.byte() if y.dtype == torch.bool else y).aminmax(), binary)
        return known

    def labels(self, logits: Tensor) -> Tensor:
        """The model's own labels, where none are given."""
        decided = self.decide(logits, "y=None")
        if decided is None:
            raise ValueError(
                f"y=None needs logits of shape (B, classes), got {tuple(logits.shape)}; pass y or predict="
            )
        return decided

    def decide(self, logits: Tensor, purpose: str) -> Tensor | None:
        """The labels that logits stand for, as ``predict`` or the loss has them; None where there is no such rule."""
        if self.predict is not None:
            decided = self.predict(logits)
            if not isinstance(decided, Tensor) or decided.shape[:1] != logits.shape[:1]:
                found = tuple(decided.shape) if isinstance(decided, Tensor) else type(decided).__name__
                raise ValueError(f"predict must return a tensor of labels ({logits.shape[0]},), got {found}")
            if not callable(self.loss) and decided.dim() != 1:
                raise ValueError(
                    f"predict must return labels of shape ({logits.shape[0]},) with loss={self.loss!r}, got "
                    f"{tuple(decided.shape)}"
                )
            return decided.detach()
        if self.loss == "bce":
            return (logits.flatten() > 0).long()
        if _is_one_logit(logits):
            raise ValueError(
                f"{purpose} needs a decision, and logits of shape {tuple(logits.shape)} have one column, whose argmax "
                "means nothing: give predict=, a callable logits -> labels (B,), or use loss='bce'"
            )
        return logits.argmax(dim=1) if logits.dim() == 2 else None

    def fooled(self, logits: Tensor, y: Tensor, targeted: bool) -> Tensor | None:
        """(B,): the decision is not y (targeted: it is y). None where y are no class labels."""
        if self.predict is None and self.loss != "bce" and (y.dtype.is_floating_point or y.dim() != 1):
            return None
        decided = self.decide(logits, "success of an attack")
        if decided is None:
            return None
        if decided.shape != y.shape:
            raise ValueError(
                f"predict returned labels of shape {tuple(decided.shape)}, y has {tuple(y.shape)}; they must be equal "
                "to be compared"
            )
        same = decided == y
        if same.dim() > 1:  # several labels of a sample count as one
            same = same.flatten(1).all(dim=1)
        return same if targeted else ~same

    def check_range(self, classes: int, known: LabelRange) -> None:
        """y are class indices, where the decision is that of classes."""
        if self.loss == "bce" or known.smallest is None or known.largest is None:
            return
        if known.smallest < 0 or known.largest >= classes:
            wrong = known.smallest if known.smallest < 0 else known.largest
            remedy = "" if self.loss == "ce" else "; for labels of another kind give predict=, logits -> labels (B,)"
            raise ValueError(f"y has the label {wrong:.0f}, but the model has {classes} classes{remedy}")

    # -- losses -------------------------------------------------------------------------------------------------------

    def check_logits(self, logits: Tensor, x: Tensor) -> None:
        """Logits are what the named losses take."""
        if callable(self.loss):
            return
        shape = tuple(logits.shape)
        if logits.shape[:1] != x.shape[:1]:
            raise ValueError(f"the model must return logits for each of the {x.shape[0]} samples, got shape {shape}")
        if not logits.dtype.is_floating_point:
            raise ValueError(f"the model must return floating-point logits, got {logits.dtype}")
        if self.loss == "bce":
            if not _is_one_logit(logits):
                raise ValueError(f"loss='bce' needs one logit per sample, (B,) or (B, 1), got {shape}; use loss='ce'")
        elif _is_one_logit(logits):
            raise ValueError(
                f"loss='ce' of one logit per sample, shape {shape}, is 0 whatever the logit; use loss='bce' with "
                "labels 0 and 1, or a callable loss with predict="
            )
        elif logits.dim() != 2:
            raise ValueError(f"loss='ce' needs logits of shape (B, classes), got {shape}; pass a callable loss")

    def losses(self, logits: Tensor, y: Tensor) -> Tensor:
        """Per sample, (B,); of the named losses in float32 at least."""
        if callable(self.loss):
            return self.loss(logits, y)
        logits = logits.to(compute_dtype(logits))
        if self.loss == "bce":
            return -F.logsigmoid(-_away(logits, y))
        return F.cross_entropy(logits, y.long(), reduction="none")

    def losses_and_pull(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of a named loss, and its gradient in the logits, where it has saturated up to a factor per sample.

        A model sure of y has p(y) = 1 in its precision, and softmax - onehot is 0. Its direction is known all the same:
        -1 for y, and for the other classes the softmax among them alone.
        """
        if self.loss == "bce":
            return self.losses(logits, y), _away(torch.ones_like(logits), y).reshape(logits.shape)
        exact = _others(logits, y).softmax(dim=1).nan_to_num_(0.0)
        exact.scatter_(1, y.long()[:, None], -exact.sum(dim=1, keepdim=True))
        if compute_dtype(logits) != logits.dtype:
            return self.losses(logits, y), exact.to(logits.dtype)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = self.losses(leaf, y)
            (plain,) = torch.autograd.grad(losses.sum(), leaf)
        left = -plain.gather(1, y.long()[:, None])
        return losses.detach(), torch.where(left >= _SATURATED, plain, exact)

    def score(self, logits: Tensor, y: Tensor, losses: Tensor) -> Tensor:
        """What rises with the loss and does not saturate, (B,): the logarithm of the odds against y."""
        if callable(self.loss):
            return losses
        if self.loss == "bce":
            return _away(logits.to(compute_dtype(logits)), y)
        others = _others(logits, y)
        return others.logsumexp(dim=1) - logits.to(others.dtype).gather(1, y.long()[:, None])[:, 0]


def _is_one_logit(logits: Tensor) -> bool:
    return logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)


def _away(logits: Tensor, y: Tensor) -> Tensor:
    """One logit per sample, signed so that it rises as the label y, 0 or 1, becomes less likely; (B,)."""
    flat = logits.flatten()
    return (1 - 2 * y.to(flat.dtype)) * flat


def _others(logits: Tensor, y: Tensor) -> Tensor:
    """Logits without those of y, in float32 at least."""
    return logits.to(compute_dtype(logits)).scatter(1, y.long()[:, None], -torch.inf)
