"""The small Inception network: modules of parallel 1x1 and 3x3 convolutions, their outputs side by side."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import SameAvgPool2d, batch_norm, convolution, same_max_pool
from ..registry import architecture
from ..stack import Stack

# Channels of the 1x1 and of the 3x3 convolution; of one that halves the image, of the 3x3 convolution.
_MODULES: dict[str, tuple[int, ...]] = {
    "incept2": (32, 32),
    "incept3": (32, 48),
    "downsamp4": (80,),
    "incept5": (112, 48),
    "incept6": (96, 64),
    "incept7": (80, 80),
    "incept8": (48, 96),
    "downsamp9": (96,),
    "incept10": (176, 160),
    "incept11": (176, 160),
}


def _normalization(channels: int, batch_normalization: bool) -> nn.Module:
    return batch_norm(channels) if batch_normalization else nn.Identity()


class Incept(nn.Module):
    """ReLU of a 1x1 and of a 3x3 convolution, concatenated along the channels."""

    def __init__(self, in_channels: int, ch1: int, ch3: int, batch_normalization: bool):
        super().__init__()
        self.conv_ch1 = convolution(in_channels, ch1, 1)
        self.conv_ch1_bn = _normalization(ch1, batch_normalization)
        self.conv_ch3 = convolution(in_channels, ch3, 3)
        self.conv_ch3_bn = _normalization(ch3, batch_normalization)

    def forward(self, x: Tensor) -> Tensor:
        ch1, ch3 = self.conv_ch1_bn(self.conv_ch1(x)), self.conv_ch3_bn(self.conv_ch3(x))
        return torch.cat([F.relu(ch1), F.relu(ch3)], dim=1)


class Downsample(nn.Module):
    """ReLU of a 3x3 convolution with stride 2 beside 3x3 max pooling with stride 2, both with SAME padding."""

    def __init__(self, in_channels: int, ch3: int, size: tuple[int, int], batch_normalization: bool):
        super().__init__()
        self.conv_ch3 = convolution(in_channels, ch3, 3, stride=2)
        self.conv_ch3_bn = _normalization(ch3, batch_normalization)
        self.pool = same_max_pool(3, 2, size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.conv_ch3_bn(self.conv_ch3(x))), self.pool(x)], dim=1)


@architecture("inception", batch_normalization=True)
@architecture("inception_sn", normalized="conv")
@architecture("inception_miyato_sn", normalized="reshape")
@architecture(
    "inception_snl2",
    batch_normalization=True,
    first_batch_normalization=False,
    normalized="conv",
    not_normalized="^fc$",
    weight_decay={"^fc$": 0.0},
)
def inception(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    batch_normalization: bool = False,
    first_batch_normalization: bool | None = None,
) -> nn.Module:
    """A 3x3 convolution with 96 channels, ten modules, a mean over 7x7, and fully connected.

    ``batch_normalization`` follows every convolution; ``first_batch_normalization`` says otherwise of the first one.
    """
    first = batch_normalization if first_batch_normalization is None else first_batch_normalization
    stack = Stack(image_shape)
    stack.conv("conv1", 96, 3)
    if first:
        stack.add("conv1_bn", batch_norm(96))
    stack.add("relu1", nn.ReLU())
    for name, widths in _MODULES.items():
        channels, height, width = stack.shape
        *ch1, ch3 = widths
        if not ch1:
            module: nn.Module = Downsample(channels, ch3, (height, width), batch_normalization)
            stack.add(name, module, (channels + ch3, -(-height // 2), -(-width // 2)))
        else:
            module = Incept(channels, ch1[0], ch3, batch_normalization)
            stack.add(name, module, (sum(widths), height, width))
    stack.add("mean_pool12", SameAvgPool2d(7))
    stack.linear("fc", num_classes)
    return stack.network()
