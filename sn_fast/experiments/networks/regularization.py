"""Weight decay of the layers for which an architecture has one."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .registry import Architecture

_ATTRIBUTE = "decayed_layers"


def set_weight_decay(network: nn.Module, architecture: Architecture, factor: float | None) -> None:
    """Note in the network which of its layers decay, and how much; ``factor`` replaces the published one.

    Raises:
        ValueError: the factor is negative, or the architecture decays no layer.
    """
    if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float) or not factor >= 0):
        raise ValueError(f"weight_decay={factor!r} must be a number >= 0")
    if factor and not architecture.weight_decay:
        raise ValueError(
            f"weight_decay={factor!r}: {architecture.name} decays no layer; for all parameters use the optimizer's own"
        )
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    decays = {
        name: published if factor is None else factor
        for pattern, published in architecture.weight_decay.items()
        for name in layers
        if re.search(pattern, name)
    }
    setattr(network, _ATTRIBUTE, decays)


def parameter_groups(network: nn.Module) -> list[dict[str, Any]]:
    """All parameters in groups for an optimizer of torch.optim, with the weight decay that the architecture asks for.

    The published loss gains factor / 2 * ||W||^2 for every layer that decays; an optimizer with coupled weight decay
    (SGD, Adam; not AdamW) adds its gradient, factor * W, once per step, however many passes the attack makes. Of a
    normalised layer W is the raw weight. Biases do not decay.
    """
    decays: dict[str, float] = getattr(network, _ATTRIBUTE, {})
    groups: dict[float, list[nn.Parameter]] = {0.0: []}
    for name, parameter in network.named_parameters():
        layer = re.sub(r"\.(weight|parametrizations\.weight\.original)$", "", name)
        groups.setdefault(decays.get(layer, 0.0), []).append(parameter)
    return [{"params": parameters, "weight_decay": factor} for factor, parameters in groups.items() if parameters]
