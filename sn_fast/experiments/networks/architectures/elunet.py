"""The ELU network for MNIST of Sinha, Namkoong, Duchi (2018)."""

from __future__ import annotations

from torch import nn

from ..registry import architecture
from ..stack import Stack


@architecture("elunet", weight_decay={".": 0.0})
@architecture("elunet_sn", normalized="conv")
def elunet(image_shape: tuple[int, int, int], num_classes: int, *, nb_filters: int = 64) -> nn.Module:
    """Convolutions 8x8 / 2 SAME, 6x6 / 2 and 5x5 VALID with nb_filters, twice and twice as many channels; ELU."""
    stack = Stack(image_shape)
    stack.conv("conv1", nb_filters, 8, stride=2)
    stack.add("elu1", nn.ELU())
    stack.conv("conv2", 2 * nb_filters, 6, stride=2, padding="VALID")
    stack.add("elu2", nn.ELU())
    stack.conv("conv3", 2 * nb_filters, 5, padding="VALID")
    stack.add("elu3", nn.ELU())
    stack.linear("fc", num_classes)
    return stack.network()
