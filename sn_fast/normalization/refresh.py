"""Bringing u, v and sigma up to date with their weights, all layers that share a device and options in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops import refresh as operators
from ..ops.fingerprint import is_replaced, record_of
from ..ops.library import has_kernels, is_capturing
from ..ops.normalize import normalize_all
from ..ops.records import is_on_host
from ..ops.refresh import LOCK
from ..ops.singular_vectors import POWER_STEPS
from . import on_device
from .certify import certified, certify
from .checkpoint import Loaded, are_unit, belongs, judge
from .context import is_wrapped
from .prepared import Pair, batches_of, note_writes, prepared, tensors_of
from .snapshot import Snapshot, moment
from .state import State

_SMALL = 1 << 16  # elements of a weight that takes less time to normalise than to come back to the code that does it


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
        made = refresh(pairs, vectors=vectors)
        return [made.get(member) or member.snapshot(weight, vectors=vectors) for member, weight in pairs]


def refresh(pairs: Iterable[Pair], *, vectors: bool = False, settle: bool = False) -> dict[State, Snapshot]:
    """Advance the states whose weight has moved, in eager code. Returns the snapshots that came with it.

    ``settle``: wait for the device where only that can tell whether a weight is another one.
    """
    made: dict[State, Snapshot] = {}
    moved: list[Pair] = []
    replaced: list[Pair] = []
    marked: list[Pair] = []  # with the record that of the new weight already
    unknown: list[Pair] = []
    unsure: list[Pair] = []
    suspects: set[State] = set()
    pairs = list(pairs)
    with _undisturbed(), on_device.ordered(pairs):
        _adopt(pairs)
        with _unmarked_on_failure(marked):
            for member, weight in pairs:
                if member.settings_changed() or member.is_resized(weight):
                    start_again(member, weight)
                    continue
                has_moved = member.has_moved(weight)
                overwritten = has_moved is not False and member.note_vectors() and not is_capturing(weight.device)
                if overwritten and not are_unit(member):  # averages of vectors, say, are not those of the average
                    unknown.append((member, weight))
                elif has_moved is None:
                    unsure.append((member, weight))
                    if settle or member.is_suspect(weight):
                        suspects.add(member)
                elif has_moved:
                    with_sigma, member.__dict__["loaded"] = member.loaded, None
                    if with_sigma is not None:
                        settle_loaded(member, weight, with_sigma)
                        continue
                    far = member.renew(weight)
                    (unknown if far is None else replaced if far else moved).append((member, weight))
                    if far is not None:
                        marked.append((member, weight))
            restart(unknown)
            restart(replaced, marked=True)
            advance(moved, marked=True)
        if unsure:
            made = _refresh_on_device(unsure, suspects, vectors)
    return made


def settle_loaded(member: State, weight: Tensor, with_sigma: bool = True) -> None:
    """Bring a state that was loaded up to date with the weight that was loaded with it; see ``judge``."""
    found = judge(member, weight, with_sigma=with_sigma)
    if found is Loaded.FOREIGN:
        restart([(member, weight)])
    elif found is Loaded.BEHIND:
        advance([(member, weight)])
    else:
        if member.options.bound:  # a proof is not taken on trust
            certify(member, weight)
        member.mark(weight)


def _refresh_on_device(
    pairs: Sequence[Pair],
    suspects: set[State],
    vectors: bool = False,
    *,
    force: bool = False,
    n_power_iterations: int | None = None,
) -> dict[State, Snapshot]:
    """Refresh, all if ``force``, where a device compares; ``suspects`` are looked at for another start."""
    made: dict[State, Snapshot] = {}
    done: set[State] = set()
    for compared in on_device.compare(
        pairs, copies=not force, vectors=vectors, force=force, n_iterations=n_power_iterations
    ):
        members = [member for member, _ in compared.batch]
        done.update(members)
        made.update(zip(members, compared.snapshots))
        replaced = compared.alarmed
        if not suspects.isdisjoint(members) and not is_capturing(compared.changes.device):
            replaced = on_device.replaced_now(compared, replaced)
        if replaced:
            with _unmarked_on_failure(replaced):
                restart(replaced, marked=True)
            for member, _ in replaced:
                made.pop(member, None)
    others = [(member, weight) for member, weight in pairs if member not in done]
    if others:
        doubtful = [(m, w) for m, w in others if m in suspects and not is_capturing(w.device)]
        restart([(m, w) for m, w in doubtful if m.record is None or is_replaced(m.operand(w), m.record)])
        if force:
            advance(others, n_power_iterations)
        else:
            _by_operator(others, vectors=False)
        for member, weight in others:
            member.saw(weight)
    return made


def _adopt(pairs: Sequence[Pair]) -> None:
    """Take the states that another process has sent, where they belong to the weights that it has sent."""
    for member, weight in pairs:
        if member.inherits:
            member.inherits = False
            if member.record is None and belongs(member, weight):
                if member.options.bound:
                    certify(member, weight)
                member.mark(weight)


@contextmanager
def _unmarked_on_failure(pairs: Sequence[Pair]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for member, _ in pairs:
            member.record = None  # it is of the new weight, the state may not be
        raise


def _is_replaced(member: State, weight: Tensor) -> bool:
    record = member.record
    return _is_unknown(member, weight) or (record is not None and is_replaced(member.operand(weight), record))


def _is_unknown(member: State, weight: Tensor) -> bool:
    return member.record is None or member.record.device != weight.device


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
    if not pairs:
        return
    with _undisturbed():
        for member, weight in pairs:
            member.allocate(weight)
        here = [(member, weight) for member, weight in pairs if not weight.is_meta]
        # On a host all at once, on a device one by one: there each takes memory for all of its steps.
        on_host = [pair for pair in here if is_on_host(pair[1].device)]
        for batch in (on_host, *([pair] for pair in here if not is_on_host(pair[1].device))):
            if batch:
                weights = [member.operand(weight.detach()) for member, weight in batch]
                us, vs = ([member.state(side) for member, _ in batch] for side in ("u", "v"))
                operators.restart(weights, us, vs, [c for member, _ in batch for c in member.code])
        advance(here, POWER_STEPS, marked=marked, exactly=False)


def advance(
    pairs: Iterable[Pair], n_power_iterations: int | None = None, *, marked: bool = False, exactly: bool = True
) -> None:
    """Advance u, v, sigma, all that share a device, options and a number of iterations in one call.

    ``marked``: the records are those of the weights already. ``exactly``: see ``batches_of``.
    """
    batches = batches_of(pairs, n_power_iterations, exactly=exactly)
    if not batches:
        return
    with _undisturbed():
        for (_, n, full, precision, tol), batch in batches.items():
            step = None if full or tol is not None else prepared(batch, precision)
            if step is None:
                operators.advance(*tensors_of(batch), [c for m, _ in batch for c in m.code], n, precision, tol)
            else:
                step.run(n)
                note_writes(batch)
            for member, weight in batch:
                if member.options.bound:
                    certify(member, weight)
                if not marked:
                    member.mark(weight)
                member.note_vectors()


def update(pairs: Iterable[Pair], n_power_iterations: int | None) -> None:
    """``advance`` now, from a new start where there is none that fits; also in compiled code."""
    pairs = list(pairs)
    _check_started(pairs)
    if not torch.compiler.is_compiling():
        with _undisturbed(), on_device.ordered(pairs):
            _adopt(pairs)
            for member, weight in pairs:
                if member.settings_changed() or member.is_resized(weight):
                    start_again(member, weight)
            here = [(member, weight) for member, weight in pairs if is_on_host(weight.device)]
            restart([(member, weight) for member, weight in here if _is_replaced(member, weight)])
            advance(here, n_power_iterations)
            if len(here) < len(pairs):
                there = [(member, weight) for member, weight in pairs if not is_on_host(weight.device)]
                restart([(member, weight) for member, weight in there if _is_unknown(member, weight)])
                suspects = {member for member, weight in there if member.is_suspect(weight)}
                _refresh_on_device(there, suspects, force=True, n_power_iterations=n_power_iterations)
        return
    with torch.no_grad():
        for (device, n, _, precision, tol), batch in batches_of(pairs, n_power_iterations).items():
            records = [_record(m, w) for m, w in batch]
            operators.update(*tensors_of(batch), records, [c for m, _ in batch for c in m.code], n, precision, tol)
            changed = torch.ones(len(batch), dtype=torch.bool, device=device)
            for i, (member, weight) in enumerate(batch):
                if member.options.bound:
                    certified(member, member.operand(weight), changed, i)


def _by_operator(pairs: Sequence[Pair], vectors: bool) -> list[Snapshot]:
    """Refresh by one operator per batch, which compares the weights when it runs."""
    found: dict[State, Snapshot] = {}
    with torch.no_grad():
        for (_, n, _, precision, tol), batch in batches_of(pairs, None).items():
            states = _batch_by_operator(batch, vectors, n, precision, tol)
            found.update({member: state for (member, _), state in zip(batch, states)})
    return [found[member] for member, _ in pairs]


def _batch_by_operator(
    batch: list[Pair], vectors: bool, n_iterations: int, precision: str, tol: float | None
) -> list[Snapshot]:
    weights, us, vs, sigmas, groups, previous = tensors_of(batch)
    records = [_record(m, w) for m, w in batch]
    states = [*sigmas, *us, *vs, *groups, *previous] if vectors or previous else sigmas
    fresh = [torch.empty_like(t) for t in states]
    changed = torch.empty(len(batch), dtype=torch.bool, device=weights[0].device)
    code = [c for m, _ in batch for c in m.code]
    arguments = code, n_iterations, precision, tol
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
    """The snapshots with the normalised weights, outside autograd, where that saves time.

    Kernels compute all in one launch; on the host small ones take a fraction of the time that they take one by one
    between large products, whose code and data push theirs out of the caches. What is computed is handed out once, so
    nothing is kept after a forward.
    """
    if torch.compiler.is_compiling() or _transforms_active():
        return list(states)
    by_device: dict[torch.device, list[int]] = {}
    for i, (member, weight) in enumerate(pairs):
        if not (member.options.full or member.is_cached) and type(weight) is nn.Parameter:
            if is_on_host(weight.device) and weight.numel() > _SMALL:
                continue
            by_device.setdefault(weight.device, []).append(i)
    for device, index in by_device.items():
        # A graph under capture has to contain the launch, and nothing that it makes may be used outside it.
        if not (has_kernels(device) or is_on_host(device)) or is_capturing(device):
            continue
        with torch.inference_mode(False), torch.no_grad():
            values = normalize_all(
                [pairs[i][0].operand(pairs[i][1]) for i in index],
                [states[i].sigma for i in index],
                [pairs[i][0].options.beta for i in index],
                [pairs[i][0].options.cap for i in index],
            )
        for i, value in zip(index, values):
            states[i].ready.append(value)  # a list of this snapshot alone
    return list(states)


def refresh_model(members: Iterable[State], *, settle: bool = True) -> None:
    """Refresh all whose own weight can be read now, outside a forward; see ``refresh``."""
    refresh(readable(members), settle=settle)


def readable(members: Iterable[State]) -> list[Pair]:
    """With their weights, the parametrizations whose weight is the module's own and can be read."""
    with torch.no_grad():
        pairs = [(m, m.incoming()) for m in members if m.geometry is not None and not m.freezes]
    return [(m, w) for m, w in pairs if m.is_own(w) and m.is_here(w)]
