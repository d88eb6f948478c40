"""How little work one power iteration can be: bytes and multiply-adds after the exact reductions, and the floors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sn_fast.normalization.hooks import after_forward, before_forward
from sn_fast.normalization.parametrization import SpectralNorm
from sn_fast.reference.geometry import Geometry

from .timing import digits

_RATES = {"fp32": ("fp32", 1), "tf32": ("tf32", 1), "3xtf32": ("tf32", 3), "bf16": ("bf16", 1)}  # peak, products


class Layer(NamedTuple):
    """A normalised layer."""

    name: str
    module: nn.Module
    state: SpectralNorm

    @property
    def weight(self) -> Tensor:
        """The raw weight, as the operators take it."""
        return self.state.operand(self.state.raw.detach())

    @property
    def geometry(self) -> Geometry:
        """What is iterated, after the exact reductions."""
        return self.state.known_geometry


def used_weights(model: nn.Module, modules: Iterable[nn.Module]) -> list[Tensor]:
    """The weights that layers compute with in one forward of ``model``: normalised now, if they are."""
    before_forward(model, ())
    try:
        return [m.weight for m in modules]  # type: ignore[misc]
    finally:
        after_forward(model, (), None)


def layers(model: nn.Module) -> list[Layer]:
    """The layers that sn_fast normalises."""
    return list(_layers(model))


def _layers(model: nn.Module) -> Iterator[Layer]:
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            (state,) = module.parametrizations["weight"]
            yield Layer(name, module, state)


class Work(NamedTuple):
    """Of one power iteration: A and A^T once each."""

    bytes: int
    multiply_adds: int

    def floors(self, peaks: Mapping[str, float], precision: str) -> dict[str, float]:
        """Microseconds that the memory and the arithmetic units need at least, at the rates of this GPU."""
        peak, products = _RATES[precision]
        memory = self.bytes / peaks["copy_gb_per_s"] / 1e3
        arithmetic = 2 * products * self.multiply_adds / peaks[f"{peak}_tflop_per_s"] / 1e6
        found = {"memory": memory, "arithmetic": arithmetic, "larger": max(memory, arithmetic)}
        return {name: digits(value) for name, value in found.items()}


def work(weight: Tensor, geometry: Geometry) -> Work:
    """Each application reads the whole weight; u and v are read once and written once. Padded zeros cost nothing."""
    reads = math.prod(_reads(geometry)) if geometry.axes else 1
    multiply_adds = 2 * weight.shape[0] * weight.shape[1] * reads
    vectors = math.prod(geometry.in_shape(weight.shape)) + math.prod(geometry.out_shape(weight.shape))
    return Work(2 * weight.numel() * weight.element_size() + 2 * 4 * vectors, multiply_adds)


def _reads(geometry: Geometry) -> Iterator[int]:
    """Per axis, how many (output, tap) pairs read an input."""
    for axis in geometry.axes:
        yield sum(p is not None for o in range(axis.out) for p in axis.window(o, geometry.mode))


def total(parts: Sequence[Work]) -> Work:
    """Of all layers."""
    return Work(sum(w.bytes for w in parts), sum(w.multiply_adds for w in parts))


def random_unit(like: Tensor) -> Tensor:
    """A random vector of norm 1."""
    x = torch.randn_like(like)
    return x / x.norm()


def power_arguments(chosen: Sequence[Layer]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """weights, us, vs, geometry of ``sn_fast::power_step``."""
    code = [c for layer in chosen for c in layer.state.code]
    return [x.weight for x in chosen], [x.state.u for x in chosen], [x.state.v for x in chosen], code
