"""The published initial weights."""

from __future__ import annotations

import torch
from torch import nn


def initialize(network: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of all convolutions and fully connected layers, in their order."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            with torch.no_grad():
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
