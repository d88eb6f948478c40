"""VGG with batch normalisation after every convolution."""

from __future__ import annotations

from torch import nn

from ..layers import SameAvgPool2d, batch_norm
from ..registry import architecture
from ..stack import Stack


@architecture("vgg")
@architecture("vgg_sn", normalized="conv")
@architecture("vgg_snl2", normalized="conv", not_normalized="^fc$", weight_decay={"^fc$": 0.0})
def vgg(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Four times two convolutions 3x3 and 2x2 pooling, a mean over 4x4, two fully connected layers without activation
    between them.
    """
    stack = Stack(image_shape)
    for i, channels in ((1, 64), (4, 128), (7, 256), (10, 512)):  # layers are numbered through, pooling included
        for name in (f"conv{i}", f"conv{i + 1}"):
            stack.conv(name, channels, 3)
            stack.add(f"{name}_bn", batch_norm(channels))
            stack.add(f"{name}_relu", nn.ReLU())
        stack.max_pool(f"pool{i + 2}", 2, 2)
    if stack.shape[1:] != (1, 1):  # of one element the mean is the element
        stack.add("mean_pool13", SameAvgPool2d(4))
    stack.linear("linear14", 512)
    stack.linear("fc", num_classes)
    return stack.network()
