"""Statistics of the theorems' assumptions: the loss gradient's norm, and how much a network enlarges its input."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..attacks.arguments import check_count, check_samples
from ..attacks.gradient import guarded, prepared
from ..attacks.task import Loss
from ..attacks.wrappers import unwrapped
from ..reference.linear_map import compute_dtype

_BATCH_SIZE = 256


def gradient_norms(
    model: nn.Module, x: Tensor, y: Tensor | None, *, loss: str | Loss = "ce", batch_size: int = _BATCH_SIZE
) -> Tensor:
    """l2 norm of each sample's loss gradient in x. The theorems on FGM and PGM take its least value for kappa.

    That is the gradient as it is, which vanishes where the model is sure of y, in float32 to exactly 0: the least value
    on real data is next to nothing, and the assumption kappa > 0 of the theorems is not met. A low quantile, or the
    mean, makes the expression finite, but it is no longer the theorem's.

    Args:
        model: gives logits; run in eval mode, with its spectrally normalised weights computed once, and left as it was.
        x: (N, *size), floating point.
        y: class labels (N,), or what a callable ``loss`` takes. None: the model's own predictions.
        loss: "ce", "bce", or a callable (logits, y) -> (N,); as in ``sn_fast.attacks.pgd``.
        batch_size: samples per forward and backward; the last may be fewer.

    Returns:
        (N,), per unit of x, in the dtype of x, float32 at least. Small gradients do not vanish in their squares.

    Raises:
        ValueError, TypeError: as ``sn_fast.attacks.pgd`` does.
    """
    check_samples(x)
    batch_size = check_count("batch_size", batch_size)
    if y is not None and (not isinstance(y, Tensor) or y.shape[:1] != x.shape[:1]):
        raise ValueError(f"y must be a tensor with one entry for each of the {x.shape[0]} samples of x")
    norms = []
    for part, labels in _batches(x, y, batch_size):
        settings = loss, False, None, None, "eval", True, None
        with prepared(model, part, labels, *settings) as (inputs, objective):
            gradient, _ = objective.gradient(inputs)
            norms.append(sample_norms(gradient))
    return torch.cat(norms) if norms else x.new_empty(0, dtype=compute_dtype(x))


def norm_gain(model: nn.Module, x: Tensor, *, batch_size: int = _BATCH_SIZE) -> Tensor:
    """||f(x)||_2 / ||x||_2 of each sample.

    Args:
        model, x, batch_size: as in ``gradient_norms``.

    Returns:
        (N,), in the dtype of x, float32 at least; infinite or NaN where x is 0.
    """
    check_samples(x)
    batch_size = check_count("batch_size", batch_size)
    model, gains = unwrapped(model), []
    with guarded(model, "eval", True, False):
        for part, _ in _batches(x, None, batch_size):
            outputs = model(part.clone())
            if not isinstance(outputs, Tensor) or outputs.shape[:1] != part.shape[:1]:
                found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
                raise ValueError(f"the model must return a tensor with {len(part)} rows, got {found}")
            gains.append(sample_norms(outputs) / sample_norms(part))
    return torch.cat(gains) if gains else x.new_empty(0, dtype=compute_dtype(x))


def sample_norms(x: Tensor) -> Tensor:
    """l2 norm of each row, (N, *size) -> (N,), where squares could vanish or overflow too."""
    flat = x.reshape(len(x), -1).to(compute_dtype(x))
    largest = flat.detach().abs().amax(dim=1, keepdim=True)
    safe = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return torch.linalg.vector_norm(flat / safe, dim=1) * safe[:, 0]


def _batches(x: Tensor, y: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield x[part], None if y is None else y[part]
