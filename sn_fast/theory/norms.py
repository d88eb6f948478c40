"""The norms of a network's layers that the theorems are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.weighted import layer_operator
from ..norms import operator_norm, operator_norm_bound
from ..norms.frobenius import frobenius_norm
from .logarithms import log, log_sum, raised
from .network import Between, Layer, Network, OutsideSetting, follow


@dataclass(frozen=True)
class LayerNorms:
    """One layer of a network.

    Attributes:
        name, kind: path of the module (or function's call) and its class; "name (2)" for a second use.
        spectral: ||W||_2 of its linear map at its input size.
        frobenius: ||W||_F of that map. A kernel's weight counts as often as it is used.
        scale: norm of the pooling and the like before it (for the last layer also after it). It belongs to the weight
            as far as the theorems go: f is the same with the pooling divided by it and the weight multiplied.
        outputs: number of its outputs per sample.
        kernel_frobenius, input_shape: of the weight itself, and of the layer's input; for the published margins.
    """

    name: str
    kind: str
    spectral: float
    frobenius: float
    scale: float
    outputs: int
    kernel_frobenius: float | None
    input_shape: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """||W||_F^2 / ||W||_2^2, the stable rank; 0 of a zero map."""
        return (self.frobenius / self.spectral) ** 2 if self.spectral else 0.0

    @property
    def log_norm(self) -> float:
        """log of scale * spectral."""
        return log(self.scale) + log(self.spectral)

    @property
    def log_ratio(self) -> float:
        """log of ``ratio``."""
        return 2 * (log(self.frobenius) - log(self.spectral)) if self.spectral else -math.inf


@dataclass(frozen=True)
class NetworkNorms:
    """The norms of all layers, and what the theorems make of them.

    Attributes:
        layers: in their order.
        smooth: whether each activation has a 1-Lipschitz derivative; if not, ``rough`` says which does not.
        notes: see ``Network``.
    """

    layers: tuple[LayerNorms, ...]
    certified: bool
    rough: str
    notes: tuple[str, ...]

    @property
    def smooth(self) -> bool:
        return not self.rough

    @property
    def width(self) -> int:
        """The largest number of outputs of a layer."""
        return max(layer.outputs for layer in self.layers)

    def up(self, x: float) -> float:
        """A logarithm made of the layers' norms: rounded up where these are upper ends."""
        return (
            raised(x, *(p for layer in self.layers for p in (layer.log_norm, layer.log_ratio))) if self.certified else x
        )

    @property
    def log_product(self) -> float:
        """log prod_i ||W_i||."""
        logs = [layer.log_norm for layer in self.layers]
        return -math.inf if -math.inf in logs else self.up(math.fsum(logs))

    @property
    def log_ratio_sum(self) -> float:
        """log sum_i ||W_i||_F^2 / ||W_i||_2^2."""
        return self.up(log_sum(layer.log_ratio for layer in self.layers))

    @property
    def log_gradient_lipschitz(self) -> float:
        """log L, L = prod_i ||W_i|| sum_i prod_{j <= i} ||W_j||."""
        so_far, products = 0.0, []
        for layer in self.layers:
            so_far += layer.log_norm
            products.append(so_far)
        return self.up(self.log_product + log_sum(products))


def network_norms(model: nn.Module, example_input: Tensor, *, certified: bool = False) -> NetworkNorms:
    """Measure a network; see ``capacity`` for the arguments."""
    network = follow(model, example_input)
    cache: dict[Any, tuple[float, float, float | None]] = {}
    measured = []
    for i, layer in enumerate(network.layers):
        key = (layer.key, layer.copies) if layer.key is not None else (i,)
        if key not in cache:
            with torch.no_grad():
                cache[key] = measured_norms(layer, certified)
        spectral, frobenius, kernel = cache[key]
        steps = [*network.between[i], *(network.between[-1] if i == len(network.layers) - 1 else [])]
        scale = math.prod(step.slope for step in steps if not step.activation)
        outputs = layer.copies * math.prod(layer.operator.out_shape)
        shape = tuple(layer.operator.in_shape)
        measured.append(LayerNorms(layer.name, layer.kind, spectral, frobenius, scale, outputs, kernel, shape))
    notes = [*network.notes, *_notes_of_maps(network)]
    return NetworkNorms(tuple(measured), certified, _rough(network), tuple(notes))


def measured_norms(layer: Layer, certified: bool) -> tuple[float, float, float | None]:
    """||W||_2 and ||W||_F of the map, and ||W||_F of the weight itself."""
    copies = math.sqrt(layer.copies)
    try:
        frobenius = frobenius_norm(layer.operator)
        if not certified:
            spectral = float(operator_norm(layer.operator))
            # A lower estimate of one and an exact value of the other must not turn a rank of 1 into less.
            return min(spectral, frobenius.value), copies * frobenius.value, _kernel_norm(layer)
        bound, info = operator_norm_bound(layer.operator, return_info=True)
    except ValueError as error:
        raise OutsideSetting(f"layer {layer.name!r} ({layer.kind}): {error}") from error
    if not info.certified or info.confidence < 1 or frobenius.upper is None:
        raise OutsideSetting(
            f"certified=True: layer {layer.name!r} ({layer.kind}) is known by its products alone, which certify nothing"
        )
    upper = math.nextafter(copies * frobenius.upper, math.inf) if layer.copies > 1 else frobenius.upper
    return float(bound), upper, _kernel_norm(layer)


def _kernel_norm(layer: Layer) -> float | None:
    op = layer_operator(layer.operator)
    return None if op is None else float(torch.linalg.vector_norm(op.weight.detach().double()))


def _rough(network: Network) -> str:
    """The first activation, or what comes between two layers, without a 1-Lipschitz derivative; empty if there is none.

    Of g after f the slope is at most slope(g) slope(f), and the derivative's Lipschitz constant at most
    curvature(g) slope(f)^2 + slope(g) curvature(f).
    """
    for steps in network.between:
        slope, curved, scale = 1.0, 0.0, 1.0
        for step in steps:
            slope, curved = step.slope * slope, step.curvature * slope**2 + step.slope * curved
            scale *= 1.0 if step.activation else step.slope
            if curved > scale * (1 + 1e-9):
                return f"{step.name} ({step.kind})"
    return ""


def _notes_of_maps(network: Network) -> list[str]:
    maps: list[Between] = [step for steps in network.between for step in steps if not step.activation]
    return [
        f"{step.name} ({step.kind}) has norm {step.slope:.6g}; the theorems have no such layer, "
        "and the norm is multiplied into that of a weight beside it"
        for step in maps
    ]
