"""Fully connected networks with one or two hidden layers, and softmax regression."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from ..layers import flatten
from ..registry import architecture


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
    """Flatten, ``hidden_layers`` times (fully connected with ``width`` units, activation), fully connected."""
    layers: dict[str, nn.Module] = {"flatten": flatten(image_shape[0])}
    inputs = math.prod(image_shape)
    for i in range(1, hidden_layers + 1):
        suffix = str(i) if hidden_layers > 1 else ""
        layers[f"hidden{suffix}"] = nn.Linear(inputs, width)
        layers[f"activation{suffix}"] = activation()
        inputs = width
    layers["fc"] = nn.Linear(inputs, num_classes)
    return nn.Sequential(OrderedDict(layers))
