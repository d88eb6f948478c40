"""What normalising costs a model on this machine: what ``sn-fast bench`` does, without the command line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from ..attacks import pgd
from ..errors import UserError, first_line
from ..normalization.model import apply_spectral_norm, normalised_modules, update_spectral_norm
from ..normalization.projection import SpectralProjection
from .timing import paired

PLAIN = "no SN"
_EPS = 0.5  # of the attack's radius; its cost does not depend on it


@dataclass(frozen=True)
class Cost:
    """Of one way to normalise.

    Attributes:
        name, computes: the way, and which norm it divides by.
        step: milliseconds of a whole training step, as ``timing.paired`` gives them; ``ratio``: to a step without.
        refresh: the same of the norms of all layers alone; None where nothing is refreshed.
        problem: why it cannot be had; empty if it can.
    """

    name: str
    computes: str
    step: dict[str, Any] | None = None
    refresh: dict[str, Any] | None = None
    problem: str = ""


@dataclass(frozen=True)
class _Way:
    """A network made ready: what else a step calls, and what a refresh is."""

    model: nn.Module
    after_step: Callable[[], object] | None = None
    refresh: Callable[[], object] | None = None


def measure_cost(
    model: nn.Module, input_size: Sequence[int], *, batch: int = 8, attack_steps: int = 0, turns: int = 5
) -> list[Cost]:
    """Training steps and refreshes of copies of ``model``: without SN, normalised, projected, and by torch.

    Steps take turns, so that ratios hold on a machine that does other things too. Inputs are noise, the optimizer is
    SGD, the loss the mean square of the output. The norms are of the layers that are normalised by default.

    Args:
        model: on the device to measure; it stays as it is.
        input_size: of one input, without the batch.
        batch: samples of a step.
        attack_steps: of PGD (l2) before each step; 0: none. The model's output must then be logits (B, classes).
        turns: of each way, at least three.

    Raises:
        UserError: the model's output is no tensor, it is normalised, or cannot be trained on these inputs; names its
            argument.
    """
    weight = next((p for p in model.parameters() if p.requires_grad), None)
    if weight is None:
        raise UserError("argument `model`: it has no parameter that trains; give one that has")
    normalised = [name for name, _, _ in normalised_modules(model)]
    if normalised:
        names = ", ".join(normalised[:3]) + ", ..." * (len(normalised) > 3)
        raise UserError(f"argument `model`: layers of it are normalised already ({names}); give it as it was before")
    device = weight.device
    x = torch.randn(batch, *input_size, device=device, dtype=weight.dtype)
    try:
        _step(_Way(copy.deepcopy(model)), x, attack_steps)()
    except UserError:
        raise
    except Exception as error:
        what = f"a training step on a batch of {batch} failed: {first_line(error)}"
        raise UserError(f"argument `input_size`: {what}") from error
    ways: dict[str, _Way] = {}
    costs: dict[str, Cost] = {}
    for name, (make, computes) in _WAYS.items():
        try:
            ways[name] = make(copy.deepcopy(model), x[:1])
            costs[name] = Cost(name, computes)
        except Exception as error:  # a layer that one way cannot take; the others may
            costs[name] = Cost(name, computes, problem=first_line(error))
    steps = {name: _on(device, _step(way, x, attack_steps)) for name, way in ways.items()}
    step_times = paired(steps, turns=max(turns, 3), budget=float("inf"), clock="wall_ms")
    refreshes = {name: _on(device, way.refresh) for name, way in ways.items() if way.refresh}
    before = {name: partial(_change, ways[name].model) for name in refreshes}
    refresh_times = paired(refreshes, turns=max(turns, 3), before=before, clock="wall_ms") if refreshes else {}
    return [
        cost if cost.problem else Cost(name, cost.computes, step_times[name], refresh_times.get(name))
        for name, cost in costs.items()
    ]


def _step(way: _Way, x: Tensor, attack_steps: int) -> Callable[[], None]:
    way.model.train()
    optimizer = torch.optim.SGD([p for p in way.model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        x_adv = pgd(way.model, x, norm=2, eps=_EPS, steps=attack_steps) if attack_steps else x
        optimizer.zero_grad()
        output = way.model(x_adv)
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise UserError(f"argument `model`: its output is a {kind}; give a model that returns a tensor")
        output.float().square().mean().backward()
        optimizer.step()
        if way.after_step is not None:
            way.after_step()

    return step


def _on(device: torch.device, run: Callable[[], object]) -> Callable[[], object]:
    """The same, to its end on the device."""
    if device.type != "cuda":
        return run

    def to_the_end() -> None:
        run()
        torch.cuda.synchronize(device)

    return to_the_end


@torch.no_grad()
def _change(model: nn.Module) -> None:
    """As an optimizer changes the weights."""
    for parameter in model.parameters():
        parameter.mul_(1 + 1e-4)


def _normalised(model: nn.Module, example: Tensor) -> _Way:
    apply_spectral_norm(model, example)
    return _Way(model, refresh=lambda: update_spectral_norm(model))


def _projected(model: nn.Module, example: Tensor) -> _Way:
    projection = SpectralProjection(model, example)
    return _Way(model, after_step=projection.step, refresh=projection.step)


def _torch(model: nn.Module, example: Tensor) -> _Way:
    """On the layers that sn_fast would normalise."""
    chosen = apply_spectral_norm(copy.deepcopy(model), example)
    layers = [(model.get_submodule(name), weight) for name, _, weight in normalised_modules(chosen)]
    for module, weight in layers:
        parametrizations.spectral_norm(module, weight)

    @torch.no_grad()
    def refresh() -> None:
        for module, weight in layers:
            getattr(module, weight)  # in training each look is an iteration

    return _Way(model, refresh=refresh)


_WAYS: dict[str, tuple[Callable[[nn.Module, Tensor], _Way], str]] = {
    PLAIN: (lambda model, example: _Way(model), "-"),
    "apply_spectral_norm": (_normalised, "true norm"),
    "SpectralProjection": (_projected, "true norm"),
    "torch's spectral_norm": (_torch, "norm of the reshaped kernel"),
}


def cost_table(costs: Sequence[Cost]) -> str:
    """Text: medians and quartiles in milliseconds, and the ratio to a step without normalisation."""
    rows = [("", "training step (ms)", "ratio", "refresh (ms)", "divides by")]
    for cost in costs:
        if cost.problem:
            rows.append((cost.name, "-", "-", "-", cost.problem))
            continue
        assert cost.step is not None
        refresh = "-" if cost.refresh is None else _spread(cost.refresh["wall_ms"])
        ratio = f"{cost.step['ratio']['median']:.2f}"
        rows.append((cost.name, _spread(cost.step["wall_ms"]), ratio, refresh, cost.computes))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def _spread(times: dict[str, float]) -> str:
    return f"{times['median']:.3g} ({times['q1']:.3g}..{times['q3']:.3g})"
