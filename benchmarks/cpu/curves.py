"""Table ``curves``: how the cost of a refresh grows with the network, and that of an update with the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sn_fast.attacks import pgd_step
from sn_fast.inspection.timing import paired

from .. import eager_updates as eager
from .methods import METHODS

_NORMALISED = ("sn_fast", "torch", "published loop")
_LAYERS = (1, 3, 10, 30, 100, 300, 1000)
_CHANNELS = (16, 32, 64, 128, 256, 512, 1024, 2048)
_SIZES = (8, 16, 32, 64, 128, 256)
_BATCHES = (1, 4, 16, 64, 256, 1024)


def rows(quick: bool = False) -> dict[str, Callable[[], Mapping[str, Any]]]:
    def some(values: Sequence[int]) -> Sequence[int]:
        return values[:3] if quick else values

    return {
        "layers": partial(_curve, _refreshes, _deep, some(_LAYERS), "layers of 8 channels, 3x3, 8x8"),
        "channels": partial(_curve, _refreshes, _wide, some(_CHANNELS), "channels of one layer, 3x3, 4x4"),
        "input size": partial(_curve, _refreshes, _large, some(_SIZES), "pixels along a side, 32 channels, 3x3"),
        "batch": partial(_curve, _updates, None, some(_BATCHES), "samples of 3x32x32, l_inf update"),
    }


def _curve(
    ways: Callable[[Any, int], dict[str, Callable[[], object]]], make: Any, values: Sequence[int], what: str
) -> dict[str, Any]:
    """Milliseconds on the processor at each value, and the slope of their logarithms over the larger half."""
    times: dict[str, list[float]] = {}
    for value in values:
        calls = 20 if make is None and value < 64 else 1
        for name, t in paired(ways(make, value), turns=7, budget=0.6, calls=calls).items():
            times.setdefault(name, []).append(t["cpu_ms"]["median"])
    upper = len(values) // 2
    return {
        "what": what,
        "values": list(values),
        "methods": {n: {"cpu_ms": t, "slope": round(slope(values[upper:], t[upper:]), 2)} for n, t in times.items()},
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of log y over log x, by least squares: y grows as x to this power."""
    a, b = [math.log(v) for v in x], [math.log(v) for v in y]
    middle_a, middle_b = sum(a) / len(a), sum(b) / len(b)
    return sum((p - middle_a) * (q - middle_b) for p, q in zip(a, b)) / sum((p - middle_a) ** 2 for p in a)


def _deep(n: int) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(n)]), torch.zeros(1, 8, 8, 8)


def _wide(n: int) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(n, n, 3, padding=1)), torch.zeros(1, n, 4, 4)


def _large(n: int) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), torch.zeros(1, 32, n, n)


def _refreshes(make: Callable[[int], tuple[nn.Module, Tensor]], value: int) -> dict[str, Callable[[], object]]:
    found: dict[str, Callable[[], object]] = {}
    for name in _NORMALISED:
        torch.manual_seed(0)
        normalised = METHODS[name].apply(*make(value))
        normalised.model.train()
        found[name] = normalised.refresh
    return found


def _updates(make: None, value: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    x = torch.rand(value, 3, 32, 32)
    start, grad = (x + 0.02 * torch.randn_like(x)).clamp(0, 1), 1e-3 * torch.randn_like(x)
    eps, alpha = 8 / 255, 2 / 255
    return {
        "sn_fast": lambda: pgd_step(start, x, grad, norm=math.inf, eps=eps, alpha=alpha, clip=(0, 1)),
        "operations one by one": lambda: eager.linf(start, x, grad, eps, alpha),
    }
