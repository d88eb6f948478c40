"""Refresh of u, v and sigma where the content of a weight has changed, and fresh copies of them for autograd."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.geometry import decode
from .fingerprint import fingerprint, renew_record, same_content, update_record
from .lanczos import lanczos_start
from .library import define, is_capturing, kernels_of
from .power_step import Vectors, power_step, starts_of
from .precision import resolved
from .prepared_step import PreparedStep, prepare
from .records import is_on_host
from .settled import settled
from .singular_vectors import LANCZOS_STEPS, POWER_STEPS, random_starts

# Threads that use one model on the host: a state moves once, and nobody reads it while it moves.
LOCK = threading.RLock()
if hasattr(os, "register_at_fork"):  # a process forked while another thread refreshes would wait for it for ever
    os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


def restart(weights: Sequence[Tensor], us: Sequence[Tensor], vs: Sequence[Tensor], geometry: Sequence[int]) -> None:
    """Write singular vectors found by Lanczos into ``us`` and ``vs``: of weights that have nothing to do with them."""
    starts = random_starts(weights, decode(geometry))
    with _exact(weights):
        found_u, found_v = lanczos_start(weights, starts, geometry, LANCZOS_STEPS)
    copy([*us, *vs], [*found_u, *found_v])


def advance(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    groups: Sequence[Tensor],
    previous: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str,
    tol: float | None = None,
) -> None:
    """``n_iterations`` power iterations, or more (``settled``), written into the state. Shapes as in ``refresh``."""
    found = _advanced(weights, us, vs, bool(previous), geometry, n_iterations, precision, tol)
    copy([*us, *vs, *sigmas, *previous, *groups], _in_order(found, geometry, bool(previous)))


Advanced = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


def _advanced(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    full: bool,
    geometry: Sequence[int],
    n_iterations: int,
    precision: str,
    tol: float | None,
) -> Advanced:
    if tol is not None and is_on_host(weights[0].device) and len(weights) > 1:  # each ends by itself
        each = [
            _advanced([w], [u], [v], full, layer.encode(), n_iterations, precision, tol)
            for w, u, v, layer in zip(weights, us, vs, decode(geometry), strict=True)
        ]
        u, v, sigma, previous, group = ([x for found in each for x in found[i]] for i in range(5))
        return u, v, sigma, previous, group
    if full and (tol is not None or n_iterations > 1):
        us, vs, _, _ = _iterated(weights, us, vs, geometry, max(1, n_iterations - 1), precision, tol)
    previous = [x.clone() for x in starts_of(us, vs)] if full else []
    if full:
        n_iterations, tol = 1, None
    u, v, sigma, group = _iterated(weights, us, vs, geometry, n_iterations, precision, tol)
    return u, v, sigma, previous, group


def _iterated(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str,
    tol: float | None,
) -> Vectors:
    if tol is None:
        return power_step(weights, us, vs, geometry, n_iterations, precision)
    with _exact(weights):
        return settled(weights, us, vs, geometry, n_iterations, precision, tol)


def _in_order(found: Advanced, geometry: Sequence[int], full: bool) -> list[Tensor]:
    u, v, sigma, previous, group = found
    tops = [g for g, layer in zip(group, decode(geometry)) if layer.groups > 1]
    return [*u, *v, *sigma, *(previous if full else []), *tops]


def _refresh(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    groups: Sequence[Tensor],
    previous: Sequence[Tensor],
    records: Sequence[Tensor],
    fresh: Sequence[Tensor],
    changed: Tensor,
    geometry: Sequence[int],
    n_iterations: int,
    precision: str = "fp32",
    tol: float | None = None,
) -> None:
    """Where a weight differs from its record: advance its state, once, and renew the record; then copy the state.

    On the host the bits are compared, and only what changed is iterated; a replaced weight restarts from Lanczos. On
    a device everything is iterated, and the comparison, on the device, chooses between the results: no host waits.

    Args:
        weights, geometry: as in ``power_step``.
        us, vs, sigmas: the state, written where the weight changed.
        groups: of grouped convolutions alone, the group that attains sigma; in the operators' order.
        previous: none, or of every operator the vector from which its last iteration starts.
        records: copies or fingerprints of the weights that the state belongs to.
        fresh: new tensors for copies of ``sigmas``, or of ``sigmas``, ``us``, ``vs``, ``groups`` and ``previous``.
        changed: (n,) bool, written: whether each weight had changed.
        n_iterations, tol: see ``settled``.
    """
    with torch.no_grad(), LOCK, _exact(weights):
        weights = [w.detach() for w in weights]
        advance_changed = _refresh_on_host if is_on_host(weights[0].device) else _refresh_on_device
        state = us, vs, sigmas, groups, previous
        advance_changed(weights, *state, records, changed, geometry, n_iterations, precision, tol)
        states = [*sigmas, *us, *vs, *groups, *previous]
        copy(fresh, states[: len(fresh)])


def _update(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    groups: Sequence[Tensor],
    previous: Sequence[Tensor],
    records: Sequence[Tensor],
    geometry: Sequence[int],
    n_iterations: int,
    precision: str = "fp32",
    tol: float | None = None,
) -> None:
    """Advance every state, whether or not its weight has changed. Arguments as in ``refresh``."""
    with torch.no_grad(), LOCK, _exact(weights):
        weights = [w.detach() for w in weights]
        advance(weights, us, vs, sigmas, groups, previous, geometry, n_iterations, precision, tol)
        for record, weight in zip(records, weights):
            update_record(record, weight)


def _exact(weights: Sequence[Tensor]) -> torch.autocast:
    return torch.autocast(weights[0].device.type, enabled=False)


def _refresh_on_host(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    groups: Sequence[Tensor],
    previous: Sequence[Tensor],
    records: Sequence[Tensor],
    changed: Tensor,
    geometry: Sequence[int],
    n_iterations: int,
    precision: str,
    tol: float | None,
) -> None:
    known = decode(geometry)
    moved = [not same_content(w, r) for w, r in zip(weights, records)]
    changed.copy_(torch.tensor(moved))
    grouped = iter(groups)
    tops = [next(grouped) if layer.groups > 1 else None for layer in known]
    replaced = [m and _renewed(r, w) for m, w, r in zip(moved, weights, records)]
    try:
        for chosen, n in ((replaced, POWER_STEPS), ([m and not r for m, r in zip(moved, replaced)], n_iterations)):
            index = [i for i, c in enumerate(chosen) if c]
            if not index:
                continue
            ws, u, v, s = ([column[i] for i in index] for column in (weights, us, vs, sigmas))
            code = [c for i in index for c in known[i].encode()]
            if chosen is replaced:
                restart(ws, u, v, code)
            top = [t for t in (tops[i] for i in index) if t is not None]
            advance(ws, u, v, s, top, [previous[i] for i in index] if previous else [], code, n, precision, tol)
    except BaseException:
        for m, record in zip(moved, records):
            if m:  # the state does not belong to the new weight: the next use has to see a change
                record.view(-1)[:1].add_(1).nan_to_num_()
        raise


def _renewed(record: Tensor, weight: Tensor) -> bool:
    """Make the record that of this weight; returns whether the weight has little to do with the one before."""
    return renew_record(record, weight)[1]


def _refresh_on_device(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    groups: Sequence[Tensor],
    previous: Sequence[Tensor],
    records: Sequence[Tensor],
    changed: Tensor,
    geometry: Sequence[int],
    n_iterations: int,
    precision: str,
    tol: float | None,
) -> None:
    step = None if previous or tol is not None else _step(weights, us, vs, sigmas, groups, geometry, precision)
    if step is not None:
        changed.copy_(step.refresh(n_iterations, records, copies=False).changes[:-1])
        return
    prints = [fingerprint(w) for w in weights]
    moved = [(p != r).any() for p, r in zip(prints, records)]
    torch.stack(moved, out=changed)
    found = _in_order(
        _advanced(weights, us, vs, bool(previous), geometry, n_iterations, precision, tol), geometry, bool(previous)
    )
    with_groups = [m for m, layer in zip(moved, decode(geometry)) if layer.groups > 1]
    flags = [*moved, *moved, *moved, *(moved if previous else []), *with_groups]
    states = [*us, *vs, *sigmas, *previous, *groups]
    copy(states, [torch.where(flag, new, old) for flag, new, old in zip(flags, found, states, strict=True)])
    copy(records, prints)


# What compiled code refreshes, by addresses.
_STEPS: OrderedDict[tuple[object, ...], PreparedStep | None] = OrderedDict()
_MOST_STEPS = 16


def _step(
    weights: Sequence[Tensor],
    us: Sequence[Tensor],
    vs: Sequence[Tensor],
    sigmas: Sequence[Tensor],
    groups: Sequence[Tensor],
    geometry: Sequence[int],
    precision: str,
) -> PreparedStep | None:
    """Kernels that refresh these tensors where they are; None where there are none, or none for these tensors."""
    if kernels_of(weights[0].device) is None:
        return None
    grouped = iter(groups)
    tops = [next(grouped) if layer.groups > 1 else None for layer in decode(geometry)]
    tensors = [*weights, *us, *vs, *sigmas, *groups]
    key = (*geometry, precision, *((t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) for t in tensors))
    if key not in _STEPS:
        if is_capturing(weights[0].device):  # its tables would have to be copied to the device now
            return None
        step = prepare(weights, us, vs, sigmas, tops, geometry, resolved(precision))
        _STEPS[key] = None if step is None or step.records is None else step
    _STEPS.move_to_end(key)
    while len(_STEPS) > _MOST_STEPS:
        _STEPS.popitem(last=False)
    return _STEPS[key]


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensors into others, all in a few launches, and bumps their versions."""
    if not targets:
        return
    torch._foreach_copy_(list(targets), list(sources))
    if lists_keep_versions():
        torch.autograd.graph.increment_version(targets)


def lists_keep_versions() -> bool:
    """Whether writes to lists of tensors (``_foreach_...``) leave ``_version``: they do under a TorchDispatchMode."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


refresh = define(
    "refresh(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, Tensor(c!)[] sigmas, Tensor(d!)[] groups,"
    " Tensor(e!)[] previous, Tensor(f!)[] records, Tensor(g!)[] fresh, Tensor(h!) changed, int[] geometry,"
    " int n_iterations, str precision='fp32', float? tol=None) -> ()",
    _refresh,
    lambda *args: None,
)

update = define(
    "update(Tensor[] weights, Tensor(a!)[] us, Tensor(b!)[] vs, Tensor(c!)[] sigmas, Tensor(d!)[] groups,"
    " Tensor(e!)[] previous, Tensor(f!)[] records, int[] geometry, int n_iterations, str precision='fp32',"
    " float? tol=None) -> ()",
    _update,
    lambda *args: None,
)
