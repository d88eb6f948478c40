"""The true norms of a network's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import operator_norm, operator_of
from .modes import evaluating

# On the residual; the norm's own error is far smaller still.
_NORM_TOLERANCE = 1e-3


def layer_norms(model: nn.Module, image_shape: Sequence[int]) -> dict[str, float]:
    """Spectral norm of the linear map that each convolution and linear layer applies, by name in order of use.

    Measured anew: not the estimate of the training.

    Args:
        model: takes images of ``image_shape``, (C, H, W).
    """
    sizes: dict[str, tuple[int, ...]] = {}

    def observe(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes[name] = tuple(args[0].shape[2:])

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    handles = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), evaluating(model):
            model(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        operators = {name: operator_of(layers[name], size or None) for name, size in sizes.items()}
        return {name: float(operator_norm(op, tol=_NORM_TOLERANCE)) for name, op in operators.items()}
