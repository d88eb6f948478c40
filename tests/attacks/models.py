"""Small models, and what the tests compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SHAPE = (3, 8, 8)
CLASSES = 5


def conv_net(*, batch_norm: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """3x8x8 to 5 classes, with layers that behave differently in training."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6) if batch_norm else nn.Identity(),
        nn.ELU(),
        nn.Dropout(dropout),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.ELU(),
        nn.Flatten(),
        nn.Linear(72, CLASSES),
    )


def samples(n: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs in [0.3, 0.7], away from the edges of [0, 1], and labels."""
    return 0.3 + 0.4 * torch.rand(n, *SHAPE, dtype=dtype), torch.randint(CLASSES, (n,))


def bits(t: Tensor) -> Tensor:
    """Elements as integers: equal only if every bit is."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.contiguous().view(width)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def per_sample_norm(delta: Tensor, norm: str) -> Tensor:
    order = {"Linf": torch.inf, "L2": 2, "L1": 1, "L1-exact": 1}[norm]
    return torch.linalg.vector_norm(delta.double().flatten(1), order, dim=1)


class Recorder:
    """A model that keeps its inputs and logits."""

    def __init__(self, model: Callable[[Tensor], Tensor]) -> None:
        self.model = model
        self.inputs: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        self.inputs.append(x.detach().clone())
        self.logits.append(logits.detach())
        return logits


NORMS = ("Linf", "L2", "L1", "L1-exact")
CANONICAL = {"Linf": "inf", "L2": "2", "L1": "1", "L1-exact": "1-exact"}
BATCH = (4, 3, 6, 5)


def triple(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    """x_adv, well inside every ball used here, then x and a gradient."""
    x = torch.rand(shape, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x + 1e-3 * torch.randn_like(x), x, torch.randn_like(x)))  # type: ignore
