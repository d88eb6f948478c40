"""The published initial weights."""

from __future__ import annotations

import math

import torch
from torch import nn

# Standard deviation of a standard normal variable cut off at -2 and 2.
_CUT_DEVIATION = 0.87962566103423978


def xavier_uniform(network: nn.Module) -> None:
    """Xavier-uniform weights and zero biases of all convolutions and fully connected layers, in their order."""
    for module in _layers(network):
        nn.init.xavier_uniform_(module.weight)


def variance_scaling(network: nn.Module) -> None:
    """Convolutions from a normal distribution cut at two deviations, variance 1 / fan_in; the rest Xavier-uniform."""
    for module in _layers(network):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            continue
        deviation = 1 / math.sqrt(module.weight[0].numel()) / _CUT_DEVIATION
        nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)


def _layers(network: nn.Module) -> list[nn.Conv2d | nn.Linear]:
    """The layers with weights, their biases set to zero."""
    found = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for module in found:
            if module.bias is not None:
                module.bias.zero_()
    return found
