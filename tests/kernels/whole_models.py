"""Normalised models and what is asked of them, shared by the tests of whole models with kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sn_fast.normalization import parametrization, refresh
from sn_fast.normalization.parametrization import SpectralNorm
from sn_fast.ops import library
from sn_fast.ops import normalize as normalize_ops
from sn_fast.ops import refresh as refresh_ops
from sn_fast.ops.prepared_step import PreparedStep

from ..normalization import models
from ..normalization.models import X, states, unchanged
from ..on_device import DEVICE


class Calls:
    """Counts calls of the operators; of normalize, the weights of each call.

    It stands in their callers' place: a dispatch mode, which sees operators too, has the refresh take another way.
    """

    def __init__(self) -> None:
        self.normalize: list[int] = []
        self.backward = self.power = 0
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Calls:
        normalize, backward = normalize_ops._normalize, normalize_ops._normalize_backward
        advance, run, refreshed = refresh_ops.advance, PreparedStep.run, PreparedStep.refresh

        def of_weights(weights: list[Tensor], *args: Any) -> list[Tensor]:
            self.normalize.append(len(weights))
            return normalize(weights, *args)

        def of_a_gradient(*args: Any) -> Tensor:
            self.backward += 1
            return backward(*args)

        def by_operator(*args: Any) -> None:
            self.power += 1
            advance(*args)

        def in_place(step: PreparedStep, n_iterations: int) -> None:
            self.power += 1
            run(step, n_iterations)

        def where_changed(step: PreparedStep, *args: Any, **options: Any) -> Any:
            found = refreshed(step, *args, **options)
            self.power += int(bool(found.changes[-1]))
            return found

        callers = (refresh, "normalize_all"), (parametrization, "normalize_all"), (normalize_ops, "_normalize")
        for module, name in callers:
            assert getattr(module, name) is normalize
            self._patch.setattr(module, name, of_weights)
        self._patch.setattr(normalize_ops, "_normalize_backward", of_a_gradient)
        self._patch.setattr(refresh_ops, "advance", by_operator)
        self._patch.setattr(PreparedStep, "run", in_place)
        self._patch.setattr(PreparedStep, "refresh", where_changed)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()


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


def kept(model: nn.Module) -> int:
    """Layers that still have the state, or the normalised weight, of a forward."""
    return sum(m.current is not None for m in layers(model))


def agree(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The model's output, which must be, bit by bit, what plain PyTorch makes of the same u, v and sigma."""
    out = model(*inputs or (X,))
    before = states(model)
    with plain_pytorch():
        assert torch.equal(out, model(*inputs or (X,)))
    assert unchanged(model, before)
    return out


class Interrupted(Exception):
    """Of ``interrupt``."""


def interrupt(model: nn.Sequential) -> None:
    """A forward that ends after the first layer, when the others' normalised weights are ready."""

    def fail(*_: object) -> None:
        assert kept(model) == len(layers(model))
        raise Interrupted

    hook = model[0].register_forward_hook(fail)
    with pytest.raises(Interrupted):
        model(X)
    hook.remove()
    assert kept(model) == 0


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same_gradients(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit by bit on the CPU; a GPU's gradient of replicated borders adds in any order."""
    if DEVICE.type == "cpu":
        return all(map(torch.equal, a, b))
    scale = max(float(x.abs().max()) for x in b)
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5 * scale) for x, y in zip(a, b))


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
