"""The last check of a bound: the graph against the model, and slopes of the model against the bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph import Untraceable
from .tracking import copied, tensors

_NOISE = 1e4  # in units of the output's rounding


def refuted(bound: float, graph: fx.Interpreter, model: nn.Module, args: tuple[Any, ...], outputs: Any) -> str:
    """Why the bound cannot be right, or nothing: a slope of the model between two inputs is above it.

    No proof that it is right, but what code does that a graph does not show is seen here.

    Raises:
        Untraceable: the graph and the model differ at another input than the example.
    """
    seen: list[tuple[Tensor, Tensor]] = [(_flat(args), _flat(outputs))]
    for inputs in _around(args):
        try:
            outputs = model(*copied(inputs))
        except Exception:  # not every input of this shape need be one of the model
            continue
        if not same_values(graph.run(*copied(inputs)), outputs):
            raise Untraceable("the traced graph computes something else than the model")
        seen.append((_flat(inputs), _flat(outputs)))
    for i, (x, fx_) in enumerate(seen):
        for y, fy in seen[:i]:
            distance, change = float((x - y).norm()), float((fx_ - fy).norm())
            noise = _NOISE * float((fx_.abs() + fy.abs()).norm()) * _precision((args, outputs))
            if math.isfinite(change) and change > bound * distance * (1 + 1e-3) + noise:
                return f"a slope of {change / distance:.4g} was measured, above the bound {bound:.4g} of the graph"
    return ""


def same_values(a: Any, b: Any) -> bool:
    """Whether two nested values of the same computation agree up to rounding."""
    ours, theirs = list(tensors(a)), list(tensors(b))
    return len(ours) == len(theirs) and all(_close(x, y) for x, y in zip(ours, theirs))


def _around(args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """An input near the example and one far away."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0):

        def moved(a: Any, scale: float = scale) -> Any:
            if not (isinstance(a, Tensor) and a.is_floating_point()):
                return a
            step = torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a.device, a.dtype)
            size = float(a.detach().double().square().mean().sqrt()) if a.numel() else 1.0
            return a.detach() + step * scale * (size or 1.0)

        yield fx.node.map_aggregate(args, moved)


def _flat(nested: Any) -> Tensor:
    parts = [t.detach().reshape(-1).double().cpu() for t in tensors(nested) if t.is_floating_point()]
    return torch.cat(parts) if parts else torch.zeros(0)


def _precision(nested: Any) -> float:
    return max((torch.finfo(t.dtype).eps for t in tensors(nested) if t.is_floating_point()), default=0.0)


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype or x.numel() == 0:
        return x.shape == y.shape and x.dtype == y.dtype
    if not (x.is_floating_point() or x.is_complex()):
        return torch.equal(x, y)
    size = float(y.abs().nan_to_num().max())
    wide = torch.complex128 if x.is_complex() else torch.float64
    return torch.allclose(x.to(wide), y.to(wide), rtol=0, atol=64 * torch.finfo(x.dtype).eps * size, equal_nan=True)
