"""Normalised models and what is asked of them, shared by the tests of whole models with kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sn_fast.normalization.parametrization import SpectralNorm
from sn_fast.ops import library

from ..normalization import models
from ..normalization.models import X, states, unchanged
from ..on_device import DEVICE


class Calls(TorchDispatchMode):
    """Counts calls of the operators; of normalize, the weights of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize: list[int] = []
        self.backward = self.power = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.sn_fast.normalize.default:
            self.normalize.append(len(args[0]))
        self.backward += func is torch.ops.sn_fast.normalize_backward.default
        self.power += func is torch.ops.sn_fast.power_step.default
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """As if there were no kernels."""
    served = library._SERVED.get(DEVICE.type)
    if served is None:
        yield
        return
    before, served._runs = served._runs, False
    try:
        yield
    finally:
        served._runs = before


def normalised(beta: float = 0.5, **options: Any) -> nn.Sequential:
    """beta is a power of two: only then is PyTorch's sigma / beta on a GPU, a product, the same number."""
    with plain_pytorch():  # the start is not what is tested, and slow where kernels are emulated
        return models.normalised(beta=beta, **options)


def every_kind() -> nn.Sequential:
    """A layer of every kind, for inputs of X's shape."""
    return nn.Sequential(
        nn.Conv2d(2, 10, 3, stride=2, padding=1),
        nn.ConvTranspose2d(10, 6, 3, stride=2, padding=1),
        nn.Conv2d(6, 6, 3, padding=1, groups=3, padding_mode="replicate"),
        nn.Conv2d(6, 4, (7, 1)),
        nn.Flatten(),
        nn.Linear(28, 5, bias=False),
    )


def layers(model: nn.Module) -> list[SpectralNorm]:
    return [m for m in model.modules() if isinstance(m, SpectralNorm)]


def ready(model: nn.Module) -> int:
    """Normalised weights that wait for their layers."""
    return len(layers(model)[0]._group._ready)


def agree(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The model's output, which must be, bit by bit, what plain PyTorch makes of the same u, v and sigma."""
    out = model(*inputs or (X,))
    before = states(model)
    with plain_pytorch():
        assert torch.equal(out, model(*inputs or (X,)))
    assert unchanged(model, before)
    return out


def leave_ready(model: nn.Sequential) -> None:
    """Use the last layer alone: the others' normalised weights stay behind, for whoever comes next."""
    assert model[-1].weight is not None
    assert ready(model) == len(layers(model)) - 1


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-4) -> None:
    for x, y in zip(a, b, strict=True):
        assert float((x - y).norm()) <= tolerance * float(y.norm()) + 1e-12


class Chosen(nn.Module):
    """Applies the layers that one names, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in "abc"})

    def forward(self, x: Tensor, names: str = "abc") -> Tensor:
        for name in names:
            x = torch.tanh(self.layers[name](x))
        return x


def moved(p: Tensor) -> Tensor:
    """Another weight, of another direction too."""
    return 1.2 * p.detach() + 0.2 * torch.randn_like(p)


@torch.no_grad()
def move_in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.copy_(moved(p))
