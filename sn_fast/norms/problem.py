"""An operator as the certificates take it: its kernel, scaled exactly, and its geometry."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ..layers.weighted import LayerOperator
from ..reference.geometry import Axis, Geometry
from .symbol import Polyphase

T = TypeVar("T", float, Tensor)
_ONE_PIXEL = Axis(size=1, out=1, kernel=1, stride=1, dilation=1, before=0)


@dataclass(frozen=True)
class ScaledConvolution:
    """A convolution proper: of a transposed layer the one whose adjoint it is; of a matrix a 1x1 on one pixel.

    Attributes:
        kernel: (groups, rows, columns, *kernel) in float64, its largest element in [1/2, 1) or zero.
        exponent: the operator's kernel is 2^exponent times ``kernel``, exactly.
        geometry: at least one axis, not transposed.
    """

    kernel: Tensor
    exponent: int
    geometry: Geometry

    @classmethod
    def of(cls, op: LayerOperator) -> ScaledConvolution:
        geometry = op.geometry
        weight = op.weight.detach().double()
        if not geometry.axes:
            weight, geometry = weight[..., None], replace(geometry, axes=(_ONE_PIXEL,))
        exponent = math.frexp(float(weight.abs().max()))[1]
        kernel = weight.reshape(geometry.groups, -1, *weight.shape[1:])
        return cls(times_power_of_two(kernel, -exponent), exponent, replace(geometry, transposed=False))

    def polyphases(self) -> tuple[Polyphase, ...]:
        """The symbol's axes."""
        return tuple(Polyphase.of(axis) for axis in self.geometry.axes)

    def at_own_size(self) -> tuple[Tensor, tuple[Polyphase, ...]]:
        """Kernel and symbol's axes for this input size alone: taps that only ever read padded zeros are gone, and an
        axis with one output is one window.
        """
        kernel, polyphases = self.kernel, []
        for i, axis in enumerate(self.geometry.axes):
            if self.geometry.mode == "zeros":
                live = [
                    any(axis.position(o, t, "zeros") is not None for o in range(axis.out)) for t in range(axis.kernel)
                ]
                if not all(live):
                    shape = [-1 if d == 3 + i else 1 for d in range(kernel.ndim)]
                    kernel = kernel * torch.tensor(live, device=kernel.device).reshape(shape)
            # A circular window that reads an input twice is none: its taps there add up.
            wraps = self.geometry.mode == "circular" and axis.extent > axis.size
            polyphases.append(Polyphase(axis.kernel, 1) if axis.out == 1 and not wraps else Polyphase.of(axis))
        return kernel, tuple(polyphases)

    def unscaled(self, value: float) -> float:
        """A bound of the kernel's operator as one of the operator's, rounded up."""
        try:
            return math.nextafter(math.ldexp(value, self.exponent), math.inf) if value else 0.0
        except OverflowError:
            return math.inf


def times_power_of_two(x: T, exponent: int) -> T:
    """x 2^exponent, also where 2^exponent alone is no float."""
    return x * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
