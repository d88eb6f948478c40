"""What the published code computes where that is less exact: for comparisons, behind ``TrainConfig.reference``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SMALL = 1e-24
_TINY = torch.finfo(torch.float32).tiny


def published_fgm(model: nn.Module, x: Tensor, y: Tensor | None = None, *, norm: str = "2", eps: float) -> Tensor:
    """FGM in the published arithmetic: x + eps g / (||g|| + 1e-24), of which the l2 norm is a root of summed squares.

    The squares of a gradient with entries below 1e-19, as confident networks have it, vanish: TensorFlow's kernels for
    GPUs, with which the published networks were trained, flush float32 numbers below 1.2e-38 to zero, on every device
    here too. The step is then far longer than eps (a factor of 1e6 at a margin of 45 logits), or none.
    ``sn_fast.attacks.fgm`` steps by eps at every margin. The gradient is taken in the mode that the model is in.

    Args:
        x: (B, C, H, W). y: labels (B,); None: the model's own predictions.
        norm: "2", "inf" or "1". eps: length of the step.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = model(point)
        labels = logits.argmax(dim=1) if y is None else y
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), point)
    if norm == "inf":
        return x + eps * gradient.sign()
    flat = gradient.flatten(1)
    length = flat.abs().sum(dim=1) if norm == "1" else _flushed(flat.square()).sum(dim=1).sqrt()
    return x + eps * gradient / (length + _SMALL).reshape(-1, *[1] * (x.ndim - 1))


def _flushed(x: Tensor) -> Tensor:
    """Subnormal float32 numbers as zeros."""
    return torch.where(x.abs() < _TINY, 0.0, x)


def published_weight_decay(factor: float, scheme: str) -> float:
    """The published loss holds the squared weights once for every copy of the graph that trains: twice under attack."""
    return factor if scheme == "erm" else 2 * factor
