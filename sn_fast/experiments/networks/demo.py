"""The network that the job trains, and the true norms of its layers."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

from ... import apply_spectral_norm, operator_norm, operator_of

CLASSES = 10
WIDTH = 32
_LARGE_IMAGE = 16
# On the residual; the norm's own error is far smaller still.
_NORM_TOLERANCE = 1e-3


def demo_network(image_shape: torch.Size, beta: float, seed: int) -> nn.Sequential:
    """Three 3x3 convolutions with ELU (as in the paper's smooth networks) and a linear layer, for (C, H, W) images.

    The later convolutions have stride 2; the first has too where images are large. Every layer's spectral norm is
    capped at ``beta``; inf leaves plain PyTorch layers. Equal seeds give equal initial weights for every beta.
    """
    channels, height, width = image_shape
    first_stride = 2 if min(height, width) > _LARGE_IMAGE else 1
    sides = [math.ceil(side / (4 * first_stride)) for side in (height, width)]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(channels, WIDTH, 3, stride=first_stride, padding=1),
                elu1=nn.ELU(),
                conv2=nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1),
                elu2=nn.ELU(),
                conv3=nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, stride=2, padding=1),
                elu3=nn.ELU(),
                flatten=nn.Flatten(),
                fc=nn.Linear(2 * WIDTH * math.prod(sides), CLASSES),
            )
        )
    return model if math.isinf(beta) else apply_spectral_norm(model, torch.zeros(1, *image_shape), beta=beta)


def layer_norms(model: nn.Sequential, image_shape: torch.Size) -> dict[str, float]:
    """The spectral norm of the linear map that each layer applies, measured anew (not the training's estimate)."""
    norms = {}
    with torch.no_grad():
        x = torch.zeros(1, *image_shape, device=next(model.parameters()).device)
        for name, layer in model.named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                operator = operator_of(layer, tuple(x.shape[2:]) or None)
                norms[name] = float(operator_norm(operator, tol=_NORM_TOLERANCE))  # type: ignore[arg-type]
            x = layer(x)
    return norms
