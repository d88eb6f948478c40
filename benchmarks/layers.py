"""Layers whose norms are compared, and their true norms, by nothing but PyTorch's own layers in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_DENSE_LIMIT = 2048  # columns, or rows, of a matrix that is decomposed whole


@dataclass
class Layer:
    """A layer, and the size of its input: () for a linear one."""

    module: nn.Module
    input_size: tuple[int, ...]

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.weight.shape, generator=generator) / math.sqrt(self.weight[0].numel())
        self.module.requires_grad_(False)
        self.weight.copy_(weight)

    @property
    def weight(self) -> Tensor:
        return self.module.weight  # type: ignore[return-value]

    @property
    def in_shape(self) -> tuple[int, ...]:
        channels = self.module.in_features if isinstance(self.module, nn.Linear) else self.module.in_channels
        return (int(channels), *self.input_size)  # type: ignore[arg-type]

    def divisor(self, normalised: Tensor) -> float:
        """What the weight was divided by."""
        return float(self.weight.double().norm() / normalised.double().norm())


def _conv(cin: int, cout: int, size: int, kernel: int = 3, **options: Any) -> Callable[[], Layer]:
    return lambda: Layer(nn.Conv2d(cin, cout, kernel, bias=False, **options), (size, size))


LAYERS: dict[str, Callable[[], Layer]] = {
    "4 to 6 channels, 8x8, s1 p0": _conv(4, 6, 8),
    "4 to 6 channels, 8x8, s1 p1": _conv(4, 6, 8, padding=1),
    "4 to 6 channels, 8x8, s2 p0": _conv(4, 6, 8, stride=2),
    "4 to 6 channels, 8x8, s2 p1": _conv(4, 6, 8, stride=2, padding=1),
    "64 channels, 32x32, s2 p1": _conv(64, 64, 32, stride=2, padding=1),
    "8 channels, 12x12, dilation 2": _conv(8, 8, 12, padding=2, dilation=2),
    "16 channels, 8x8, depthwise": _conv(16, 16, 8, padding=1, groups=16),
    "8 channels, 12x12, reflect": _conv(8, 8, 12, padding=1, padding_mode="reflect"),
    "16 to 8 channels, 6x6, transposed 4x4 s2 p1": lambda: Layer(
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, bias=False), (6, 6)
    ),
    "Linear(512, 256)": lambda: Layer(nn.Linear(512, 256, bias=False), ()),
}


@torch.no_grad()
def truth(layer: Layer) -> tuple[float, str]:
    """The largest singular value in float64, and how it was found."""
    module = copy.deepcopy(layer.module).double()
    example = torch.zeros(1, *layer.in_shape, dtype=torch.float64)
    columns, rows = example.numel(), module(example).numel()
    if min(columns, rows) > _DENSE_LIMIT:
        return lanczos(module, layer.in_shape), "Lanczos"
    matrix = module(torch.eye(columns, dtype=torch.float64).reshape(-1, *layer.in_shape)).reshape(columns, rows)
    return float(torch.linalg.matrix_norm(matrix, 2)), "SVD"


def lanczos(module: nn.Module, in_shape: Sequence[int], tolerance: float = 1e-8, limit: int = 500) -> float:
    """Golub, Kahan and Lanczos with full orthogonalisation, until |A^T u - sigma v| <= tolerance * sigma."""

    def matvec(v: Tensor) -> Tensor:
        return module(v.reshape(1, *in_shape)).flatten()

    start = torch.randn(math.prod(in_shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    transposed = torch.func.vjp(matvec, start)[1]
    us: list[Tensor] = []
    vs = [start / start.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(limit):
        u, alpha = _new_direction(matvec(vs[-1]), us)
        us, alphas = [*us, u], [*alphas, alpha]
        v, beta = _new_direction(transposed(u)[0], vs)
        bidiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        bidiagonal += torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
        left, values, _ = torch.linalg.svd(bidiagonal)
        if beta * abs(float(left[-1, 0])) <= tolerance * float(values[0]):
            return float(values[0])
        vs, betas = [*vs, v], [*betas, beta]
    raise RuntimeError(f"Lanczos did not reach {tolerance:g} in {limit} steps")


def _new_direction(x: Tensor, basis: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The unit vector along what ``basis`` lacks of ``x``, and the length of that."""
    for _ in range(2 if basis else 0):
        stacked = torch.stack(list(basis))
        x = x - stacked.T @ (stacked @ x)
    length = float(x.norm())
    return x / max(length, 1e-300), length
