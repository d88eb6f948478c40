"""Tables ``refresh`` and ``steps``: the norms of all layers after a change of the weights, and whole training steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sn_fast.attacks import fgm, pgd, wrm
from sn_fast.inspection.timing import paired

from ..layers import lanczos
from ..peers import NotOffered
from ..published_loop import input_shapes
from .data import missing, why_failed
from .methods import METHODS, Normalised, layers_of
from .networks import NETWORKS, Network

BATCH = 8
_DRIFTS, _DRIFT = 20, 1e-3  # changes of every weight before the values are compared, and their relative size
_LARGE = 4.0  # times the initial weights: all norms are above 1, so a cap divides like a scale
_TRUTH = 3e-4  # residual of the true norms, relative; their error is of the order of its square

Step = Callable[[nn.Module, Tensor, Tensor], Tensor]
SCHEMES: dict[str, Step] = {
    "plain": lambda model, x, y: x,
    "FGM": lambda model, x, y: fgm(model, x, y, norm=2, eps=0.5),
    "PGD-10": lambda model, x, y: pgd(model, x, y, norm=2, eps=0.5, steps=10),
    "WRM-15": lambda model, x, y: wrm(model, x, y, eps=0.5, steps=15),
}


def refresh_rows(quick: bool = False) -> dict[str, Callable[[], Mapping[str, Any]]]:
    return {name: partial(_refresh, network, quick) for name, network in NETWORKS.items()}


def step_rows(quick: bool = False) -> dict[str, Callable[[], Mapping[str, Any]]]:
    return {
        f"{name}, {scheme}": partial(_steps, network, scheme, quick)
        for name, network in NETWORKS.items()
        for scheme in SCHEMES
        if network.narrow or scheme in ("plain", "FGM")
    }


def _refresh(network: Network, quick: bool) -> dict[str, Any]:
    """Time of a refresh by each method, and what it divides by over the true norms."""
    plain = network.seeded()
    for m in layers_of(plain).values():
        with torch.no_grad():
            m.weight.mul_(_LARGE)
    made, cells = _applied(plain, network)
    made.pop("no SN")
    reference = {name: m.weight.detach().clone() for name, m in layers_of(plain).items()}
    for turn in range(2 if quick else _DRIFTS):
        for raw in (reference, *(n.raw for n in made.values())):
            _drift(raw, turn)
        for n in made.values():
            n.refresh()
    true = _true_norms(plain, reference, network)
    for name, n in made.items():
        divisors = {layer: float(reference[layer].norm() / w.detach().norm()) for layer, w in n.weights().items()}
        ratios = [divisors[layer] / true[layer] for layer in true]
        cells[name] = {"over_truth": [min(ratios), max(ratios)]}
    times = paired(
        {name: n.refresh for name, n in made.items()},
        turns=3 if quick else 9,
        budget=8.0,
        before={name: partial(_drift, n.raw, 99) for name, n in made.items()},
    )
    for name, t in times.items():
        cells[name] |= t
    return {"layers": len(true), "methods": {name: cells[name] for name in METHODS if name in cells}}


def _steps(network: Network, scheme: str, quick: bool) -> dict[str, Any]:
    """Time of a whole training step under each method: gradient, update, and what the method does beside them."""
    made, cells = _applied(network.seeded(), network)
    x, y = network.example(BATCH), torch.arange(BATCH) % 10
    steps = {name: step_of(n, SCHEMES[scheme], x, y) for name, n in made.items()}
    cells |= paired(steps, turns=3 if quick else 7, budget=1.0 if quick else 12.0)
    return {"batch": BATCH, "methods": {name: cells[name] for name in METHODS if name in cells}}


def step_of(n: Normalised, attack: Step, x: Tensor, y: Tensor) -> Callable[[], None]:
    """A whole training step of a normalised network."""
    optimizer = torch.optim.SGD(n.model.parameters(), lr=1e-3)
    n.model.train()

    def step() -> None:
        n.before_step()
        x_adv = attack(n.model, x, y)
        optimizer.zero_grad()
        F.cross_entropy(n.model(x_adv), y).backward()
        optimizer.step()
        n.after_step()

    return step


def _applied(plain: nn.Module, network: Network) -> tuple[dict[str, Normalised], dict[str, Any]]:
    """The network under each method; and why there is none."""
    made: dict[str, Normalised] = {}
    cells: dict[str, Any] = {}
    for name, method in METHODS.items():
        if method.package and (how := missing(method.package)):
            cells[name] = {"missing": how}
            continue
        try:
            torch.manual_seed(0)
            made[name] = method.apply(copy.deepcopy(plain), network.example())
            made[name].model.train()
            made[name].refresh()
        except NotOffered as reason:
            cells[name] = {"not_offered": str(reason)}
        except Exception as error:
            made.pop(name, None)
            cells[name] = why_failed(error)
    return made, cells


@torch.no_grad()
def _drift(raw: Mapping[str, Tensor], turn: int) -> None:
    """What an optimizer does: every weight moves a little, for all methods alike."""
    for i, weight in enumerate(raw.values()):
        generator = torch.Generator().manual_seed(1000 * turn + i)
        weight.mul_(1 + _DRIFT * torch.randn(weight.shape, generator=generator))


@torch.no_grad()
def _true_norms(plain: nn.Module, weights: Mapping[str, Tensor], network: Network) -> dict[str, float]:
    """Of every layer's own map, in float64 by PyTorch's layers alone."""
    shapes = input_shapes(plain, network.example())
    found = {}
    for name, m in layers_of(plain).items():
        if isinstance(m, nn.Linear):
            found[name] = float(torch.linalg.matrix_norm(weights[name].double(), 2))
            continue
        layer: Any = copy.deepcopy(m).double()
        layer.weight.copy_(weights[name])
        layer.bias = None
        found[name] = lanczos(layer, shapes[m], _TRUTH)
    return found
