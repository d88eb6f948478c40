"""The parametrization of a registered layer whose operator has a linear function of the parameter for its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.kinds import kind_of
from ..layers.linear import weight_of
from ..reference.linear_map import compute_dtype
from .parametrization import SpectralNorm


class MappedSpectralNorm(SpectralNorm):
    """Parametrization W -> W / max(1, sigma / beta), where sigma is the norm of the operator with weight f(W).

    f is linear, such as a fixed gain or mask: so the layer's map is divided as its parameter is.
    """

    def operand(self, weight: Tensor) -> Tensor:
        kind, geometry = kind_of(self.module), self.layer_geometry
        assert kind is not None
        size = geometry.input_size if geometry is not None and geometry.axes else None
        found = weight_of(kind.operator(self.module, weight, size))
        assert found is not None
        return found

    def _shaped(self, result: Tensor, weight: Tensor) -> Tensor:
        # result = f(W) / divisor: a linear functional of both tells the divisor, and its gradient.
        operand = self.operand(weight)
        dtype = compute_dtype(operand)
        probe = operand.detach().to(dtype)
        largest = probe.abs().amax()
        probe = probe / torch.where(largest > 0, largest, 1.0)
        share, whole = ((t.to(dtype) * probe).sum() for t in (result, operand))
        factor = torch.where(largest > 0, share / torch.where(largest > 0, whole, 1.0), 1.0)
        return (weight.to(compute_dtype(weight)) * factor).to(weight.dtype)
