"""Tables ``certificates`` and ``networks``: bounds of single layers, and Lipschitz bounds of whole networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.experiments import build_network
from sn_fast.inspection.timing import paired

from ..layers import lanczos
from ..models import resnet18
from . import bounds
from .data import why_failed
from .networks import vgg16

_TRUTH = 3e-4  # residual of the true norms, relative
# (Cin, Cout, kernel, stride, input size): convolutions of ResNet-18 on 32 x 32 images, and of ResNet-50 on images
# smaller than its own, for which the truth would take minutes; so would some of the bounds for layers of 512 channels.
_LAYERS = {
    "ResNet-18: 3 to 64, 3x3, 32x32": (3, 64, 3, 1, 32),
    "ResNet-18: 64 to 64, 3x3, 32x32": (64, 64, 3, 1, 32),
    "ResNet-18: 64 to 128, 3x3, stride 2, 32x32": (64, 128, 3, 2, 32),
    "ResNet-18: 128 to 128, 3x3, 16x16": (128, 128, 3, 1, 16),
    "ResNet-18: 128 to 256, 3x3, stride 2, 16x16": (128, 256, 3, 2, 16),
    "ResNet-50: 3 to 64, 7x7, stride 2, 64x64": (3, 64, 7, 2, 64),
    "ResNet-50: 256 to 64, 1x1, 14x14": (256, 64, 1, 1, 14),
    "ResNet-50: 128 to 128, 3x3, stride 2, 28x28": (128, 128, 3, 2, 28),
}
_GRIDS = {64: 32, 128: 16}  # points of Delattre's grid per axis, up to so many channels; 8 above
_MOST_SPATIAL = 128  # channels (after the stride's polyphase) up to which the spatial iteration is affordable


def certificate_rows(quick: bool = False) -> dict[str, Callable[[], Mapping[str, Any]]]:
    names = list(_LAYERS)[:2] if quick else list(_LAYERS)
    return {name: partial(_certificates, *_LAYERS[name]) for name in names}


def _certificates(cin: int, cout: int, kernel: int, stride: int, size: int) -> dict[str, Any]:
    """Each bound over the true norm, and its time."""
    layer = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / math.sqrt(cin * kernel**2))
    op = sn_fast.operator_of(layer, (size, size))
    weight = layer.weight.detach().double()
    wide = min(cout, cin * min(stride, kernel) ** 2)
    grid = next((points for most, points in _GRIDS.items() if wide <= most), 8)
    ways: dict[str, Callable[[], float]] = {
        "sn_fast, auto": lambda: float(sn_fast.operator_norm_bound(op)),
        'sn_fast, "fft"': lambda: float(sn_fast.operator_norm_bound(op, method="fft")),
        "Delattre 2023": lambda: bounds.gram_iteration_circular(weight, stride, grid),
        "Delattre 2024": lambda: bounds.gram_iteration_spatial(weight, stride),
        "tensor norm": lambda: bounds.tensor_norm(weight, stride),
        "fantastic four": lambda: bounds.fantastic_four(weight, stride),
        "reshaped kernel": lambda: bounds.reshaped(weight, stride),
    }
    if wide > _MOST_SPATIAL:
        del ways["Delattre 2024"]
    layer.double().requires_grad_(False)
    true = lanczos(layer, (cin, size, size), _TRUTH)
    values: dict[str, float] = {}
    times = paired({n: partial(_keep, values, n, way) for n, way in ways.items()}, budget=1.0, least=1, warm=False)
    return {
        "truth": float(f"{true:.6g}"),
        "grid": grid,
        "methods": {name: {"over_truth": round(values[name] / true, 4)} | times[name] for name in ways},
    }


# -- whole networks ---------------------------------------------------------------------------------------------------


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


_NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-256-256-10": (_mlp, (784,)),
    "AlexNet of the paper": (lambda: build_network("alexnet", in_channels=3), (3, 28, 28)),
    "VGG-16, a quarter wide": (lambda: vgg16(4), (3, 32, 32)),
    "ResNet-18, a quarter wide": (lambda: resnet18(16), (3, 32, 32)),
}


def network_rows(quick: bool = False) -> dict[str, Callable[[], Mapping[str, Any]]]:
    names = list(_NETWORKS)[:1] if quick else list(_NETWORKS)
    return {name: partial(_network, *_NETWORKS[name]) for name in names}


def _network(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, Any]:
    """A certified bound, the product that ignores what the layers are, and what inputs attain."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().requires_grad_(False)
        x = torch.rand(4, *shape)
    ways: dict[str, Callable[[], float]] = {
        "lipschitz_bound": lambda: float(sn_fast.lipschitz_bound(model, x[:1]).bound),
        "product of reshaped norms": lambda: _product_of_reshaped(model),
        "attained (autograd)": lambda: _attained(model, x),
    }
    cells: dict[str, Any] = {}
    values: dict[str, float] = {}
    for name, way in ways.items():
        try:
            cells[name] = paired({name: partial(_keep, values, name, way)}, budget=0.5, least=1, warm=False)[name]
            cells[name] |= {"value": float(f"{values[name]:.5g}")}
        except Exception as error:
            cells[name] = why_failed(error)
    return {"methods": cells}


def _keep(values: dict[str, float], name: str, way: Callable[[], float]) -> None:
    values[name] = way()


def _product_of_reshaped(model: nn.Module) -> float:
    """Of every layer, what torch's spectral norm would divide by; residual connections and BatchNorm are not seen."""
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return math.prod(float(torch.linalg.matrix_norm(w.flatten(1), 2)) for w in weights)


def _attained(model: nn.Module, x: Tensor, iterations: int = 10) -> float:
    """The largest norm of the Jacobian at the given inputs, from below, by power iteration."""
    largest = 0.0
    for one in x:
        v = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
        for _ in range(iterations):
            v = v / v.norm()
            pull: Callable[[Tensor], tuple[Tensor]] = torch.func.vjp(lambda z: model(z[None])[0], one)[1]
            u = torch.func.jvp(lambda z: model(z[None])[0], (one,), (v,))[1]
            largest = max(largest, float(u.norm()))
            (v,) = pull(u)
    return largest
