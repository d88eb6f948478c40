"""The small network of ``sn-fast train`` on the digits."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ... import apply_spectral_norm

CLASSES = 10
WIDTH = 32
_LARGE_IMAGE = 16


def demo_network(
    image_shape: Sequence[int],
    beta: float,
    seed: int,
    num_classes: int = CLASSES,
    gradient: Literal["detached", "full"] = "detached",
) -> nn.Sequential:
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
                fc=nn.Linear(2 * WIDTH * math.prod(sides), num_classes),
            )
        )
    if math.isinf(beta):
        return model
    return apply_spectral_norm(model, torch.zeros(1, *image_shape), beta=beta, gradient=gradient)
