"""Batches of layers that one call serves, and the prepared steps of those whose tensors stay where they are."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..ops.library import kernels_of
from ..ops.precision import resolved
from ..ops.prepared_step import PreparedStep, prepare
from .state import State

Pair: TypeAlias = "tuple[State, Tensor]"  # a parametrization, and the weight that it is given
Batch: TypeAlias = "tuple[torch.device, int, bool, str, float | None]"  # what the members of one call share


def batches_of(
    pairs: Iterable[Pair], n_power_iterations: int | None = None, *, exactly: bool = True
) -> dict[Batch, list[Pair]]:
    """All that share a device, a number of iterations, the kind of gradient, a precision and a tolerance.

    ``exactly``: a number that is given is that of all iterations, whatever the layers' tolerances.
    """
    batches: dict[Batch, list[Pair]] = {}
    for member, weight in pairs:
        o = member.options
        tol = None if n_power_iterations is not None and exactly else o.tol
        key = weight.device, n_power_iterations or o.n_power_iterations, o.full, o.product_precision, tol
        batches.setdefault(key, []).append((member, weight))
    return batches


Tensors: TypeAlias = "tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]"


def tensors_of(batch: Sequence[Pair]) -> Tensors:
    """Weights, u, v, sigma, groups and previous vectors, as the operators take them."""
    members = [m for m, _ in batch]
    weights = [m.operand(w).detach() for m, w in batch]
    us, vs, sigmas = (
        [m.state("u") for m in members],
        [m.state("v") for m in members],
        [m.state(m.iterated_name) for m in members],
    )
    groups = [m.state("top_group") for m in members if m.known_geometry.groups > 1]
    return weights, us, vs, sigmas, groups, [m.state(m.previous_name) for m in members if m.options.full]


# Prepared steps, by a batch's first member. A cache of the module, for members are copied and pickled.
_Found: TypeAlias = "OrderedDict[tuple[int, ...], tuple[object, PreparedStep | None]]"
_steps: weakref.WeakKeyDictionary[State, _Found] = weakref.WeakKeyDictionary()
_MOST_BATCHES = 4  # the whole model, and parts that are trained in turn


def prepared(batch: Sequence[Pair], precision: str) -> PreparedStep | None:
    """In place, by kernels, if nothing stands between a weight and its memory: found once for the same tensors."""
    if kernels_of(batch[0][0].state("u").device) is None:
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():  # these want operators
        return None
    found = _steps.setdefault(batch[0][0], OrderedDict())
    members, where = tuple([id(m) for m, _ in batch]), _places(batch, precision)
    known, step = found.get(members, (None, None))
    if known != where:
        step = _prepare(batch, resolved(precision))
        found[members] = where, step
    found.move_to_end(members)
    while len(found) > _MOST_BATCHES:
        found.popitem(last=False)
    return step


def _prepare(batch: Sequence[Pair], precision: str) -> PreparedStep | None:
    weights, us, vs, sigmas, _, _ = tensors_of(batch)
    if not all(type(w) is nn.Parameter and o.data_ptr() == w.data_ptr() for (_, w), o in zip(batch, weights)):
        return None
    code = [c for m, _ in batch for c in m.code]
    return prepare(weights, us, vs, sigmas, [m.buffer("top_group") for m, _ in batch], code, precision)


def _places(batch: Sequence[Pair], precision: str) -> list[object]:
    """All that a prepared step takes for given: where weights and states lie, and how."""
    places: list[object] = [precision]
    for member, weight in batch:
        places += (type(weight), member.geometry)
        there = member._buffers
        for t in (weight, there["u"], there["v"], there[member.iterated_name], there.get("top_group")):
            places += (None,) if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride())
    return places


def note_writes(batch: Sequence[Pair]) -> None:
    """Tell autograd that the state was written in place."""
    states = [m.buffer(name) for m, _ in batch for name in ("u", "v", m.iterated_name, "top_group")]
    torch.autograd.graph.increment_version([t for t in states if t is not None])
