"""Layers as TensorFlow computes them."""

from __future__ import annotations

from torch import Tensor, nn


class FlattenNHWC(nn.Module):
    """(B, C, H, W) -> (B, H W C): the order in which a fully connected layer's published weights take their inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def flatten(channels: int) -> nn.Module:
    """``FlattenNHWC``, or PyTorch's own layer, which makes no copy, where one channel leaves no choice of order."""
    return nn.Flatten() if channels == 1 else FlattenNHWC()
