"""The networks of the benchmarks: ResNet-18 and WRN-28-10 on 32 x 32, ResNet-50 on 224 x 224, as published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)


class _Basic(nn.Module):
    """Two 3x3 convolutions (He et al. 2016)."""

    expansion = 1

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(cin, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3), nn.BatchNorm2d(width)
        self.shortcut = _shortcut(cin, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class _Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the stride is in the 3x3, as in torchvision."""

    expansion = 4

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        cout = self.expansion * width
        self.conv1, self.bn1 = _conv(cin, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, cout, 1), nn.BatchNorm2d(cout)
        self.shortcut = _shortcut(cin, cout, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class _PreActivation(nn.Module):
    """Normalisation and ReLU before each 3x3 (Zagoruyko, Komodakis 2016)."""

    expansion = 1

    def __init__(self, cin: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(cin), _conv(cin, width, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), _conv(width, width, 3)
        self.shortcut = _conv(cin, width, 1, stride) if stride > 1 or cin != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        plain = x if isinstance(self.shortcut, nn.Identity) else y
        return self.conv2(F.relu(self.bn2(self.conv1(y)))) + self.shortcut(plain)


def _shortcut(cin: int, cout: int, stride: int) -> nn.Module:
    if stride == 1 and cin == cout:
        return nn.Identity()
    return nn.Sequential(_conv(cin, cout, 1, stride), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    """Any of the three families: a stem, stages of blocks, pooling, a linear layer."""

    def __init__(
        self,
        block: type[_Basic] | type[_Bottleneck] | type[_PreActivation],
        blocks: Sequence[int],
        widths: Sequence[int],
        *,
        stem: int,
        large: bool = False,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = _conv(3, stem, 7, 2) if large else _conv(3, stem, 3)
        before = block is _PreActivation
        self.after_stem = nn.Identity() if before else nn.Sequential(nn.BatchNorm2d(stem), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        layers: list[nn.Module] = []
        cin = stem
        for i, (n, width) in enumerate(zip(blocks, widths)):
            for j in range(n):
                layers.append(block(cin, width, 2 if i and not j else 1))
                cin = width * block.expansion
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.BatchNorm2d(cin), nn.ReLU()) if before else nn.Identity()
        self.fc = nn.Linear(cin, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.after_stem(self.stem(x)))
        return self.fc(self.head(self.blocks(x)).mean(dim=(2, 3)))


def resnet18(width: int = 64) -> ResNet:
    """ResNet-18 for 32 x 32 images; ``width``: of its first stage."""
    return ResNet(_Basic, (2, 2, 2, 2), (width, 2 * width, 4 * width, 8 * width), stem=width)


def wrn28(width: int = 160) -> ResNet:
    """WRN-28-10 for 32 x 32 images; ``width``: of its first stage."""
    return ResNet(_PreActivation, (4, 4, 4), (width, 2 * width, 4 * width), stem=16)


class Network(NamedTuple):
    """A network to be measured, and the size of its input."""

    make: Callable[[], ResNet]
    input_size: tuple[int, int]

    def example(self, batch: int = 1) -> Tensor:
        """A batch of random inputs."""
        return torch.randn(batch, 3, *self.input_size)


NETWORKS = {
    "ResNet-18, 32x32": Network(resnet18, (32, 32)),
    "ResNet-50, 224x224": Network(
        lambda: ResNet(_Bottleneck, (3, 4, 6, 3), (64, 128, 256, 512), stem=64, large=True, classes=1000), (224, 224)
    ),
    "WRN-28-10, 32x32": Network(wrn28, (32, 32)),
}
TINY = {
    "tiny ResNet, 8x8": Network(lambda: ResNet(_Basic, (1, 1), (4, 12), stem=4), (8, 8)),
}
"""For rehearsals."""
