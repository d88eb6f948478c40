"""Fully connected networks with one or two hidden layers, and softmax regression."""

from __future__ import annotations

from torch import nn

from ..registry import architecture
from ..stack import Stack


@architecture("mlp1_relu", activation=nn.ReLU, hidden_layers=1)
@architecture("mlp1_relu_sn", activation=nn.ReLU, hidden_layers=1, normalized="conv")
@architecture("mlp1_elu", activation=nn.ELU, hidden_layers=1)
@architecture("mlp1_elu_sn", activation=nn.ELU, hidden_layers=1, normalized="conv")
@architecture("mlp2_relu", activation=nn.ReLU, hidden_layers=2)
@architecture("mlp2_relu_sn", activation=nn.ReLU, hidden_layers=2, normalized="conv")
@architecture("mlp2_elu", activation=nn.ELU, hidden_layers=2)
@architecture("mlp2_elu_sn", activation=nn.ELU, hidden_layers=2, normalized="conv")
@architecture("softmax", activation=nn.Identity, hidden_layers=0)
@architecture("softmax_sn", activation=nn.Identity, hidden_layers=0, normalized="conv")
def mlp(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    activation: type[nn.Module],
    hidden_layers: int,
    width: int = 512,
) -> nn.Module:
    """``hidden_layers`` times (fully connected with ``width`` units, activation), and fully connected."""
    stack = Stack(image_shape)
    for i in range(1, hidden_layers + 1):
        number = str(i) if hidden_layers > 1 else ""
        stack.linear(f"hidden{number}", width)
        stack.add(f"activation{number}", activation())
    stack.linear("fc", num_classes)
    return stack.network()
