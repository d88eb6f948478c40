"""Layers normalised as by torch.nn.utils.parametrizations.spectral_norm, alone, on top of a mask and below one."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sn_fast
from sn_fast.normalization.parametrization import SpectralNorm

PLACES = ["alone", "on top of a mask", "below a mask"]


@pytest.fixture(autouse=True, params=[False, True], ids=["set_data", "swap"])
def swap(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(request.param)
    yield request.param
    torch.__future__.set_swap_module_params_on_conversion(before)


class Mask(nn.Module):
    """Zeroes a third of a weight, always the same one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(7)) > 1 / 3
        self.register_buffer("kept", kept.to(weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


def spectral_norm(layer: nn.Module, name: str = "weight", **options) -> nn.Module:
    return sn_fast.spectral_norm(layer, name, mode="scale", operator="reshape", **options)


def normalised(layer: nn.Module, place: str = "alone", **options) -> nn.Module:
    if place == "on top of a mask":
        parametrize.register_parametrization(layer, "weight", Mask(layer.weight))
    spectral_norm(layer, **options)
    if place == "below a mask":
        parametrize.register_parametrization(layer, "weight", Mask(layer.weight))
    return layer


def state_of(layer: nn.Module, name: str = "weight") -> SpectralNorm:
    return next(p for p in layer.parametrizations[name] if isinstance(p, SpectralNorm))


def buffers(layer: nn.Module, name: str = "weight") -> list[Tensor]:
    return [b.clone() for b in state_of(layer, name).buffers()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def matrix(weight: Tensor, layer: nn.Module) -> Tensor:
    """The matrix whose rows are outputs: axis 1 of a transposed convolution's weight, else axis 0."""
    return weight.movedim(1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0, 0).flatten(1)


def truth(layer: nn.Module, place: str = "alone", name: str = "weight") -> Tensor:
    """The normalised weight by a dense SVD in float64."""
    raw = layer.parametrizations[name].original.detach().double()
    masked = Mask(raw)(raw)
    seen = masked if place == "on top of a mask" else raw
    scale = torch.linalg.matrix_norm(matrix(seen, layer), 2)
    return (masked if place == "below a mask" else seen) / scale


def assert_true(layer: nn.Module, place: str = "alone", name: str = "weight", rtol: float = 1e-5) -> None:
    expected = truth(layer, place, name)
    torch.testing.assert_close(
        getattr(layer, name).double(), expected, rtol=rtol, atol=rtol * float(expected.abs().max())
    )


def trained(layer: nn.Module, x: Tensor, steps: int, lr: float = 0.1) -> None:
    """Steps of SGD, without one after the last forward."""
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().sum().backward()
        optimizer.step()
