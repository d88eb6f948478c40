"""The networks of the CPU's tables, for 32 x 32 images (AlexNet: 28 x 28), of widths that one thread trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sn_fast.experiments import build_network

from ..models import resnet18, wrn28

_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: pooling


@dataclass(frozen=True)
class Network:
    """How a network is made, and the size of its images. ``narrow``: small enough for attacks of many steps."""

    make: Callable[[], nn.Module]
    size: int = 32
    narrow: bool = False

    def example(self, batch: int = 1) -> Tensor:
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(1))

    def seeded(self) -> nn.Module:
        """The network with the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()


def vgg16(share: int = 1) -> nn.Sequential:
    """Simonyan and Zisserman 2015, configuration D, of a width that ``share`` divides, with the one linear layer that
    is usual for CIFAR."""
    layers: list[nn.Module] = []
    cin = 3
    for width in (full // share for full in _VGG16):
        layers += [nn.Conv2d(cin, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
        cin = width or cin
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512 // share, 10))


class Attention(nn.Module):
    """Multi-head attention of three separate linear maps and one after them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.after = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = [m(x).view(batch, length, self.heads, -1).transpose(1, 2) for m in (self.query, self.key, self.value)]
        mixed = F.scaled_dot_product_attention(*parts)
        return self.after(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Dosovitskiy et al. 2021: patches of 4 x 4, four blocks of width 128, mean of the tokens; 25 Linear layers."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4, patch: int = 4, size: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


NETWORKS = {
    "ResNet-18": Network(resnet18),
    "ResNet-18, a quarter wide": Network(lambda: resnet18(16), narrow=True),
    "WRN-28-10, a quarter wide": Network(lambda: wrn28(40)),
    "VGG-16": Network(vgg16),
    "AlexNet of the paper": Network(lambda: build_network("alexnet", in_channels=3), size=28),
    "ViT, every Linear": Network(ViT, narrow=True),
}
