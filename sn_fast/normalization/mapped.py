"""The parametrization of a registered layer whose operator has a linear function of the parameter for its weight."""

from __future__ import annotations

from torch import Tensor

from ..layers.kinds import kind_of
from ..layers.linear import weight_of
from ..reference.normalize import normalize as normalize_reference
from ..reference.normalize import rayleigh
from ..reference.power import sigma_through_last_iteration
from .parametrization import SpectralNorm


class MappedSpectralNorm(SpectralNorm):
    """Parametrization W -> W / max(1, sigma / beta), where sigma is the norm of the operator with weight f(W).

    f is linear, such as a fixed gain or mask: so the layer's map is divided as its parameter is. In plain PyTorch.
    """

    def operand(self, weight: Tensor) -> Tensor:
        kind, geometry = kind_of(self.module), self.layer_geometry
        assert kind is not None
        size = geometry.input_size if geometry is not None and geometry.axes else None
        found = weight_of(kind.operator(self.module, weight, size))
        assert found is not None
        return found

    def normalize(self, weight: Tensor) -> Tensor:
        operand, geometry, options = self.operand(weight), self.known_geometry, self.options
        if options.full:
            sigma = sigma_through_last_iteration(operand, self.previous, geometry)
        else:
            sigma, u, v = (self.state(name) for name in ("sigma", "u", "v"))
            slope = rayleigh(operand, u, v, self.buffer("top_group"), geometry)
            sigma = sigma + (slope - slope.detach())  # the value of the buffer, the gradient at u and v
        return normalize_reference(weight, sigma, options.beta, options.cap)

    def can_be_ready(self, weight: Tensor) -> bool:
        return False  # what the group computes for many layers at once divides the operator's weight
