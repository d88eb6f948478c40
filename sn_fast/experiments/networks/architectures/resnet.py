"""Pre-activation residual networks (He et al. 2016), with the published paddings.

Convolutions with stride take explicitly padded images. As published, the norm of such a convolution is that of its map
from the padded image, which is at least that of the map from the image itself.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ..initial import variance_scaling
from ..layers import batch_norm, convolution
from ..registry import architecture
from ..stack import Stack

# The published number of filters is multiplied by 2^i in stage i, on top of the stage before.
_PUBLISHED, _INTENDED = (16, 32, 128), (16, 32, 64)
_PUBLISHED_LARGE, _INTENDED_LARGE = (64, 128, 512), (64, 128, 256)


class Block(nn.Module):
    """(BN) ReLU, 3x3 convolution, (BN) ReLU, 3x3 convolution, plus the input or a 1x1 projection of the first ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, project: bool, batch_normalization: bool):
        super().__init__()
        self.batch_normalization = batch_norm(in_channels) if batch_normalization else nn.Identity()
        self.projection_shortcut = _conv(in_channels, channels, 1, stride) if project else None
        self.pad = nn.ZeroPad2d(1) if stride > 1 else nn.Identity()
        self.conv1 = _conv(in_channels, channels, 3, stride)
        self.batch_normalization_1 = _late_batch_norm(channels) if batch_normalization else nn.Identity()
        self.conv2 = _conv(channels, channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.batch_normalization(x))
        shortcut = x if self.projection_shortcut is None else self.projection_shortcut(active)
        inner = F.relu(self.batch_normalization_1(self.conv1(self.pad(active))))
        return self.conv2(inner) + shortcut


def _conv(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Conv2d:
    padding = "SAME" if stride == 1 else "VALID"
    return convolution(in_channels, channels, kernel, stride=stride, padding=padding, bias=False)


def _late_batch_norm(channels: int) -> nn.BatchNorm2d:
    return batch_norm(channels, momentum=0.997, eps=1e-5)


@architecture("resnet", initialize=variance_scaling)
@architecture("resnet_bn", batch_normalization=True, initialize=variance_scaling)
@architecture("resnet_sn", normalized="conv", initialize=variance_scaling)
@architecture("resnet_intended", widths=_INTENDED, initialize=variance_scaling)
@architecture("resnet_intended_bn", widths=_INTENDED, batch_normalization=True, initialize=variance_scaling)
@architecture("resnet_intended_sn", widths=_INTENDED, normalized="conv", initialize=variance_scaling)
@architecture(
    "resnet_sn_large",
    widths=_PUBLISHED_LARGE,
    blocks=8,
    stem_kernel=7,
    stem_stride=2,
    normalized="conv",
    initialize=variance_scaling,
)
@architecture(
    "resnet_intended_sn_large",
    widths=_INTENDED_LARGE,
    blocks=8,
    stem_kernel=7,
    stem_stride=2,
    normalized="conv",
    initialize=variance_scaling,
)
def resnet(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    widths: Sequence[int] = _PUBLISHED,
    blocks: int = 5,
    batch_normalization: bool = False,
    stem_kernel: int = 3,
    stem_stride: int = 1,
) -> nn.Module:
    """A convolution, ``len(widths)`` stages of ``blocks`` blocks, a global mean, and fully connected.

    Every stage but the first halves the image.
    """
    stack = Stack(image_shape)
    channels, height, width = image_shape
    if stem_stride > 1:
        pad = stem_kernel // 2
        stack.add("pad", nn.ZeroPad2d(pad), (channels, height + 2 * pad, width + 2 * pad))
    padding = "VALID" if stem_stride > 1 else "SAME"
    stack.conv("conv2d", widths[0], stem_kernel, stride=stem_stride, padding=padding, bias=False)
    for i, channels in enumerate(widths):
        before, height, width = stack.shape
        stride = 1 if i == 0 else 2
        stage = {"block0": Block(before, channels, stride, True, batch_normalization)}
        for j in range(1, blocks):
            stage[f"block{j}"] = Block(channels, channels, 1, False, batch_normalization)
        size = -(-height // stride), -(-width // stride)
        stack.add(f"block_layer{i + 1}", nn.Sequential(OrderedDict(stage)), (channels, *size))
    if batch_normalization:
        stack.add("batch_normalization", _late_batch_norm(stack.shape[0]))
    stack.add("relu", nn.ReLU())
    stack.add("mean", nn.AdaptiveAvgPool2d(1), (stack.shape[0], 1, 1))
    stack.linear("fc", num_classes)
    return stack.network()
