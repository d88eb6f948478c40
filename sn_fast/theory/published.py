"""The layers that the paper's code normalises margins by: all that have a weight, whatever is between them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks.gradient import guarded
from ..layers.kinds import classes_of, spatial_axes
from ..layers.linear import operator_of
from ..lipschitz.graph import unwrapped
from .network import Layer, OutsideSetting
from .norms import LayerNorms, NetworkNorms, measured_norms


def published_norms(model: nn.Module, example_input: Tensor, *, certified: bool = False) -> NetworkNorms:
    """Norms of every linear and convolutional layer in order of first use, as ``get_overall_sn`` takes them.

    Pooling, normalisation of responses or batches, and shortcuts are left out, so that the networks of the paper that
    the theorems do not cover (AlexNet, Inception, ResNet) have norms too.

    Raises:
        OutsideSetting: the model runs no such layer, or the norm of one cannot be measured.
        TypeError: the arguments are no module and floating-point tensor.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    if not isinstance(example_input, Tensor) or not example_input.is_floating_point():
        found = getattr(example_input, "dtype", type(example_input).__name__)
        raise TypeError(f"example_input is {found}; give a floating-point tensor with a batch dimension")
    model = unwrapped(model)
    inputs: dict[str, tuple[int, ...]] = {}

    def observe(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.setdefault(name, tuple(args[0].shape))

    layers = {name: m for name, m in model.named_modules() if isinstance(m, classes_of())}
    handles = [layer.register_forward_pre_hook(partial(observe, name)) for name, layer in layers.items()]
    try:
        with guarded(model, "eval", True, False):
            model(example_input)
            measured = tuple(_measured(name, layers[name], shape, certified) for name, shape in inputs.items())
    finally:
        for handle in handles:
            handle.remove()
    if not measured:
        raise OutsideSetting("the model runs no linear or convolutional layer")
    return NetworkNorms(measured, certified, "", ())


def _measured(name: str, module: nn.Module, shape: tuple[int, ...], certified: bool) -> LayerNorms:
    axes = spatial_axes(module)
    kind = type(module).__name__
    with torch.no_grad():
        layer = Layer(name, kind, operator_of(module, shape[len(shape) - axes :] if axes else None))
        spectral, frobenius, kernel = measured_norms(layer, certified)
    outputs = math.prod(layer.operator.out_shape)
    return LayerNorms(name, kind, spectral, frobenius, 1.0, outputs, kernel, tuple(layer.operator.in_shape))
