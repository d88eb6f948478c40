"""A small normalised network, its state, and its true norms: shared by the tests of the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sn_fast import apply_spectral_norm, operator_norm, operator_of
from sn_fast.normalization.parametrization import SpectralNorm

X = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=2),
        nn.ELU(),
        nn.Conv2d(6, 4, 1),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 3),
    )


def normalised(beta: float = 0.7, **options) -> nn.Sequential:
    return apply_spectral_norm(network(), torch.randn(1, 2, 8, 8), beta=beta, **options)


def states(model: nn.Module) -> list[Tensor]:
    return [b.clone() for m in model.modules() if isinstance(m, SpectralNorm) for b in m.buffers()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states(model), before, strict=True))


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def true_norms(model: nn.Module, *, raw: bool) -> list[float]:
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [float(operator_norm(operator_of(m, raw=raw), method="dense")) for m in layers]


class Operators(TorchDispatchMode):
    """Sees the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **kwargs or {})
