"""The small AlexNet: two times convolution, pooling and local response normalisation, and three fully connected."""

from __future__ import annotations

from torch import nn

from ..layers import ConstantDropout, LocalResponseNorm, batch_norm
from ..registry import architecture
from ..stack import Stack

_DROPPED = 0.2  # share of the elements


@architecture("alexnet")
@architecture("alexnet_bn", batch_normalization=True)
@architecture("alexnet_dropout", dropout=_DROPPED)
@architecture("alexnet_wd", weight_decay={".": 5e-4})
@architecture("alexnet_nolrn", lrn=False)
@architecture("alexnet_elu", activation=nn.ELU)
@architecture("alexnet_sn", normalized="conv")
@architecture("alexnet_miyato_sn", normalized="reshape")
@architecture("alexnet_elu_sn", activation=nn.ELU, normalized="conv")
@architecture("alexnet_snl2", normalized="conv", not_normalized="^fc$", weight_decay={"^fc$": 0.0})
def alexnet(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    activation: type[nn.Module] = nn.ReLU,
    batch_normalization: bool = False,
    lrn: bool = True,
    dropout: float = 0.0,
    dropout_in_tests: bool = False,
) -> nn.Module:
    """Convolutions 5x5 with 96 and 256 channels, fully connected layers with 384 and 192 units.

    ``dropout`` ends with training; with ``dropout_in_tests`` it does not, as in the published network.
    """
    stack = Stack(image_shape)
    for i, channels in ((1, 96), (2, 256)):
        stack.conv(f"conv{i}", channels, 5)
        if batch_normalization:
            stack.add(f"conv{i}_bn", batch_norm(channels))
        stack.add(f"conv{i}_activation", activation())
        stack.max_pool(f"pool{i}", 3, 2)
        if lrn:
            stack.add(f"norm{i}", LocalResponseNorm())
        if dropout:
            stack.add(f"dropout{i}", ConstantDropout(dropout) if dropout_in_tests else nn.Dropout(dropout))
    for i, units in ((1, 384), (2, 192)):
        stack.linear(f"linear{i}", units)
        stack.add(f"linear{i}_activation", activation())
    stack.linear("fc", num_classes)
    return stack.network()
