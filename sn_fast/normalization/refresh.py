"""Bringing u, v and sigma up to date with their weights, all layers that share a device and options in one call."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..ops import refresh as operators
from ..ops.fingerprint import is_replaced, record_of
from ..ops.library import has_kernels, kernels_of
from ..ops.normalize import normalize_all
from ..ops.precision import resolved
from ..ops.prepared_step import PreparedStep, prepare
from ..ops.refresh import LOCK
from ..ops.singular_vectors import POWER_STEPS
from .certify import certified, certify
from .state import Snapshot, State, is_wrapped, moment

Pair: TypeAlias = "tuple[State, Tensor]"  # a parametrization, and the weight that it is given


@contextmanager
def _undisturbed() -> Iterator[None]:
    """One thread at a time, outside autograd and outside transforms of torch.func, which forbid writes to a state."""
    with LOCK, torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
        yield


def _check_started(pairs: Iterable[Pair]) -> None:
    for member, _ in pairs:
        if member.record is None and torch.compiler.is_compiling():
            raise RuntimeError(
                "spectral_norm: the weights were loaded or replaced since sigma was computed, and torch.compile cannot "
                "start it anew; run one eager forward, or call update_spectral_norm(model), first"
            )


def snapshots(pairs: Sequence[Pair]) -> list[Snapshot]:
    """Refresh those whose weight has moved, and copy the states for one forward."""
    _check_started(pairs)
    vectors = torch.is_grad_enabled() or _transforms_active()
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # these see operators, or fakes, alone
        if not torch.compiler.is_compiling():
            restart([(m, w) for m, w in pairs if m.record is None and type(w) is nn.Parameter])
        return _by_operator(pairs, vectors)
    with _undisturbed():
        # What other parametrizations make within a transform is the transform's own.
        pairs = [(member, member.incoming() if is_wrapped(weight) else weight) for member, weight in pairs]
        refresh(pairs)
        return [member.snapshot(weight, vectors=vectors) for member, weight in pairs]


def refresh(pairs: Iterable[Pair]) -> None:
    """Advance the states whose weight has moved, in eager code."""
    moved: list[Pair] = []  # with the record that of the new weight already
    replaced: list[Pair] = []
    unknown: list[Pair] = []
    early: list[Pair] = []
    unsure: list[Pair] = []
    with _undisturbed():
        try:
            for member, weight in pairs:
                if member.settings_changed() or member.is_resized(weight):
                    start_again(member, weight)
                    continue
                has_moved = member.has_moved(weight)
                if has_moved is None:
                    unsure.append((member, weight))
                elif has_moved and member.record is None:
                    unknown.append((member, weight))
                elif has_moved:
                    far = member.renew(weight)
                    (early if far is None else replaced if far else moved).append((member, weight))
            restart(unknown)
            restart(replaced, marked=True)
            advance(moved, marked=True)
            advance(early)
        except BaseException:
            for member, _ in (*moved, *replaced):
                member.record = None  # it is of the new weight, the state may not be
            raise
        if unsure:
            _by_operator(unsure, vectors=False)
            for member, weight in unsure:
                member.saw(weight)


def _is_replaced(member: State, weight: Tensor) -> bool:
    record = member.record
    if record is None:
        return True
    if weight.device.type != "cpu" or record.device != weight.device:
        return False
    return is_replaced(member.operand(weight), record)


def start_again(member: State, weight: Tensor) -> None:
    """Start with the layer's settings as they are now, for the input size at hand."""
    assert member.layer_geometry is not None
    member.set_geometry(member.geometry_for(member.layer_geometry.input_size), weight)
    member.sizes.clear()
    restart([(member, weight)])


def restart(pairs: Sequence[Pair], *, marked: bool = False) -> None:
    """Find u, v, sigma anew, for weights that have nothing to do with the ones at hand.

    ``marked``: the records are those of the weights already.
    """
    with _undisturbed():
        for member, weight in pairs:
            member.allocate(weight)
            if not weight.is_meta:
                us, vs = [member.state("u")], [member.state("v")]
                operators.restart([member.operand(weight.detach())], us, vs, member.code)
        advance([(member, weight) for member, weight in pairs if not weight.is_meta], POWER_STEPS, marked=marked)


def advance(pairs: Iterable[Pair], n_power_iterations: int | None = None, *, marked: bool = False) -> None:
    """Advance u, v, sigma, all that share a device, options and a number of iterations in one call.

    ``marked``: the records are those of the weights already.
    """
    batches = _batches(pairs, n_power_iterations)
    with _undisturbed():
        for (_, n, full, precision), batch in batches.items():
            step = None if full else _prepared(batch, resolved(precision))
            if step is None:
                operators.advance(*_tensors(batch), [c for m, _ in batch for c in m.code], n, precision)
            else:
                step.run(n)
                states = [m.buffer(name) for m, _ in batch for name in ("u", "v", m.iterated_name, "top_group")]
                torch.autograd.graph.increment_version([t for t in states if t is not None])
            for member, weight in batch:
                if member.options.bound:
                    certify(member, weight)
                if not marked:
                    member.mark(weight)


def update(pairs: Iterable[Pair], n_power_iterations: int | None) -> None:
    """``advance`` now, from a new start where there is none that fits; also in compiled code."""
    pairs = list(pairs)
    _check_started(pairs)
    if not torch.compiler.is_compiling():
        with _undisturbed():
            for member, weight in pairs:
                if member.settings_changed() or member.is_resized(weight):
                    start_again(member, weight)
            restart([(member, weight) for member, weight in pairs if _is_replaced(member, weight)])
            advance(pairs, n_power_iterations)
        return
    with torch.no_grad():
        for (device, n, _, precision), batch in _batches(pairs, n_power_iterations).items():
            records = [_record(m, w) for m, w in batch]
            operators.update(*_tensors(batch), records, [c for m, _ in batch for c in m.code], n, precision)
            changed = torch.ones(len(batch), dtype=torch.bool, device=device)
            for i, (member, weight) in enumerate(batch):
                if member.options.bound:
                    certified(member, member.operand(weight), changed, i)


Batch: TypeAlias = "tuple[torch.device, int, bool, str]"  # what the members of one call share


def _batches(pairs: Iterable[Pair], n_power_iterations: int | None) -> dict[Batch, list[Pair]]:
    batches: dict[Batch, list[Pair]] = {}
    for member, weight in pairs:
        o = member.options
        key = weight.device, n_power_iterations or o.n_power_iterations, o.full, o.product_precision
        batches.setdefault(key, []).append((member, weight))
    return batches


Tensors: TypeAlias = "tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]"


def _tensors(batch: Sequence[Pair]) -> Tensors:
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


def _by_operator(pairs: Sequence[Pair], vectors: bool) -> list[Snapshot]:
    """Refresh by one operator per batch, which compares the weights when it runs."""
    found: dict[State, Snapshot] = {}
    with torch.no_grad():
        for (_, n, _, precision), batch in _batches(pairs, None).items():
            states = _batch_by_operator(batch, vectors, n, precision)
            found.update({member: state for (member, _), state in zip(batch, states)})
    return [found[member] for member, _ in pairs]


def _batch_by_operator(batch: list[Pair], vectors: bool, n_iterations: int, precision: str) -> list[Snapshot]:
    weights, us, vs, sigmas, groups, previous = _tensors(batch)
    records = [_record(m, w) for m, w in batch]
    states = [*sigmas, *us, *vs, *groups, *previous] if vectors or previous else sigmas
    fresh = [torch.empty_like(t) for t in states]
    changed = torch.empty(len(batch), dtype=torch.bool, device=weights[0].device)
    code = [c for m, _ in batch for c in m.code]
    arguments = code, n_iterations, precision
    operators.refresh(weights, us, vs, sigmas, groups, previous, records, fresh, changed, *arguments)
    n = len(batch)
    grouped = iter(fresh[3 * n : 3 * n + len(groups)])
    results = []
    for i, (member, weight) in enumerate(batch):
        sigma, estimate = fresh[i], None
        if member.options.bound:
            sigma, estimate = certified(member, weights[i], changed, i), fresh[i]
        u, v = (fresh[n + i], fresh[2 * n + i]) if len(fresh) > n else (None, None)
        group = next(grouped) if len(fresh) > n and member.known_geometry.groups > 1 else None
        start = fresh[3 * n + len(groups) + i] if previous else None
        results.append(Snapshot(sigma, estimate, u, v, group, start, moment(weight), []))
    return results


def _record(member: State, weight: Tensor) -> Tensor:
    if member.record is None:  # under a FakeTensorMode, say: nothing has run yet
        member.record = record_of(member.operand(weight), hashed=member.is_hashed_on(weight.device))
    return member.record


def _transforms_active() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


# -- by kernels, in place or for many layers at once ------------------------------------------------------------------


def with_ready_weights(pairs: Sequence[Pair], states: Sequence[Snapshot]) -> list[Snapshot]:
    """The snapshots with the normalised weights, outside autograd, where kernels compute all in one launch.

    What is computed is handed out once, so a forward of the model costs one launch and nothing is kept after it.
    """
    if torch.compiler.is_compiling() or _transforms_active():
        return list(states)
    by_device: dict[torch.device, list[int]] = {}
    for i, (member, weight) in enumerate(pairs):
        if not (member.options.full or member.is_cached) and type(weight) is nn.Parameter:
            by_device.setdefault(weight.device, []).append(i)
    result = list(states)
    for device, index in by_device.items():
        # A graph under capture has to contain the launch, and nothing that it makes may be used outside it.
        if not has_kernels(device) or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            continue
        with torch.inference_mode(False), torch.no_grad():
            values = normalize_all(
                [pairs[i][0].operand(pairs[i][1]) for i in index],
                [states[i].sigma for i in index],
                [pairs[i][0].options.beta for i in index],
                [pairs[i][0].options.cap for i in index],
            )
        for i, value in zip(index, values):
            result[i] = states[i]._replace(ready=[value])
    return result


# Prepared steps, by a batch's first member. A cache of the module, for members are copied and pickled.
_Found: TypeAlias = "OrderedDict[tuple[int, ...], tuple[object, PreparedStep | None]]"
_steps: weakref.WeakKeyDictionary[State, _Found] = weakref.WeakKeyDictionary()
_MOST_BATCHES = 4  # the whole model, and parts that are trained in turn


def _prepared(batch: Sequence[Pair], precision: str) -> PreparedStep | None:
    """In place, by kernels, if nothing stands between a weight and its memory: found once for the same tensors."""
    if kernels_of(batch[0][0].state("u").device) is None:
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():  # these want operators
        return None
    found = _steps.setdefault(batch[0][0], OrderedDict())
    members, where = tuple(id(m) for m, _ in batch), (precision, [_addresses(m, w) for m, w in batch])
    known, step = found.get(members, (None, None))
    if known != where:
        step = _prepare(batch, precision)
        found[members] = where, step
    found.move_to_end(members)
    while len(found) > _MOST_BATCHES:
        found.popitem(last=False)
    return step


def _prepare(batch: Sequence[Pair], precision: str) -> PreparedStep | None:
    weights, us, vs, sigmas, _, _ = _tensors(batch)
    if not all(type(w) is nn.Parameter and o.data_ptr() == w.data_ptr() for (_, w), o in zip(batch, weights)):
        return None
    code = [c for m, _ in batch for c in m.code]
    return prepare(weights, us, vs, sigmas, [m.buffer("top_group") for m, _ in batch], code, precision)


def _addresses(member: State, weight: Tensor) -> tuple[object, ...]:
    """All that a prepared step takes for given: where weight and state lie, and how."""
    states = [member.buffer(name) for name in ("u", "v", member.iterated_name, "top_group")]
    places = [None if t is None else (t.data_ptr(), t.dtype, t.shape, t.stride()) for t in states]
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride(), type(weight), member.geometry, *places


def refresh_model(members: Iterable[State]) -> None:
    """Refresh all whose own weight can be read now, outside a forward."""
    refresh(readable(members))


def readable(members: Iterable[State]) -> list[Pair]:
    """With their weights, the parametrizations whose weight is the module's own and can be read."""
    with torch.no_grad():
        pairs = [(m, m.incoming()) for m in members if m.geometry is not None and not m.freezes]
    return [(m, w) for m, w in pairs if m.is_own(w) and m.is_here(w)]
