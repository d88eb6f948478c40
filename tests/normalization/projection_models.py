"""Layers and a network for the tests of the projection, and their norms."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

import sn_fast

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 7),
    "wide": lambda: nn.Linear(5, 20),
    "strided": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "dilated, reflect": lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "patches": lambda: nn.Conv2d(3, 6, 2, stride=2),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
    "1d": lambda: nn.Conv1d(3, 5, 4, stride=3),
    "3d": lambda: nn.Conv3d(2, 2, 2, padding=1),
}
SIZES = {"1d": (9,), "3d": (3, 3, 3)}


def shape_of(layer: nn.Module, kind: str) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (layer.in_features,)
    return (layer.in_channels, *SIZES.get(kind, (6, 6)))


def dense(layer: nn.Module, kind: str) -> Tensor:
    """The layer's matrix in float64."""
    size = None if isinstance(layer, nn.Linear) else shape_of(layer, kind)[1:]
    return sn_fast.operator_of(copy.deepcopy(layer).double(), size).to_dense()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.ReLU(),
        nn.Linear(16, 5),
    )


X, Y = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(5 * model(X.to(next(model.parameters()))), Y.to(next(model.parameters()).device))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


def norms(model: nn.Sequential) -> list[float]:
    op = sn_fast.operator_of(copy.deepcopy(model[0]).double(), (8, 8))
    matrices = [op.to_dense(), model[3].weight.detach().double(), model[5].weight.detach().double()]
    return [torch.linalg.matrix_norm(m.detach(), 2).item() for m in matrices]


def norms_of_matrix(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))
