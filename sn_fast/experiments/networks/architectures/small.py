"""The two small networks on which attacks and training steps of the published code were recorded."""

from __future__ import annotations

from torch import nn

from ..layers import LocalResponseNorm
from ..registry import architecture
from ..stack import Stack


@architecture("small_elu")
@architecture("small_elu_sn", normalized="conv")
def small_elu(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """3x3 convolutions with 6 channels and with 8 channels and stride 2, ELU, and fully connected."""
    stack = Stack(image_shape)
    stack.conv("conv1", 6, 3)
    stack.add("elu1", nn.ELU())
    stack.conv("conv2", 8, 3, stride=2)
    stack.add("elu2", nn.ELU())
    stack.linear("fc", num_classes)
    return stack.network()


@architecture("small_lrn")
@architecture("small_lrn_sn", normalized="conv")
def small_lrn(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A 5x5 convolution, ReLU, pooling, local response normalisation, two 3x3 convolutions with ELU (the first with
    stride 2, the second VALID), and fully connected; 8 channels throughout.
    """
    stack = Stack(image_shape)
    stack.conv("conv1", 8, 5)
    stack.add("relu1", nn.ReLU())
    stack.max_pool("pool1", 3, 2)
    stack.add("norm1", LocalResponseNorm())
    stack.conv("conv2", 8, 3, stride=2)
    stack.add("elu2", nn.ELU())
    stack.conv("conv3", 8, 3, padding="VALID")
    stack.add("elu3", nn.ELU())
    stack.linear("fc", num_classes)
    return stack.network()
