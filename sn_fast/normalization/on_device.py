"""Refresh where only the device compares a weight with its record: launches alone, for which no host waits.

Kernels predicate the iterations of each layer on what the comparison finds. A weight that has little to do with the one
before needs more than an iteration: it needs a new start, which takes the host. The host learns of it

- at once, where it sees itself that a weight is another one (another tensor, another version without an optimizer's
  step, an own call outside a forward): then it waits for the comparison;
- else at the first refresh after the device has told: such a weight, written through ``.data``, is followed until then.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.library import is_capturing
from ..ops.power_step import MAX_OPERATORS
from ..ops.prepared_step import PreparedStep
from .certify import certified
from .prepared import Pair, batches_of, note_writes, prepared
from .snapshot import Snapshot, moment
from .state import State

_REPLACED = 2  # csrc/spectral/fingerprint.h: Change
_MOST = MAX_OPERATORS  # layers of one call


class Compared(NamedTuple):
    """One call for a batch of layers."""

    batch: list[Pair]
    changes: Tensor  # (n + 1,) int32, of each layer 0, 1 (moved) or 2 (replaced)
    snapshots: list[Snapshot]
    alarmed: list[Pair]  # of which an earlier call, as far as it has ended, found that the weight was replaced


def compare(
    pairs: Sequence[Pair],
    *,
    copies: bool = True,
    vectors: bool = False,
    force: bool = False,
    n_iterations: int | None = None,
) -> list[Compared]:
    """Refresh by kernels those whose tensors they take; leaves out the others.

    ``copies``: copy the states for one forward, with ``vectors`` if a backward may follow. ``force``: all are iterated.
    """
    found = []
    for (_, n, full, precision, tol), batch in batches_of(pairs, n_iterations).items():
        for first in range(0, len(batch), _MOST):
            part = batch[first : first + _MOST]
            step = None if full or tol is not None else prepared(part, precision)
            if step is not None and step.records is not None and all(_has_record(m) for m, _ in part):
                found.append(_compare(step, part, n, copies, vectors, force))
    return found


def _has_record(member: State) -> bool:
    return member.record is not None and member.record.dtype == torch.int64


def _compare(step: PreparedStep, batch: list[Pair], n: int, copies: bool, vectors: bool, force: bool) -> Compared:
    records = [m.record for m, _ in batch]
    alarmed = _alarmed(step, batch)
    found = step.refresh(n, records, copies=copies, vectors=vectors, force=force)  # type: ignore[arg-type]
    note_writes(batch)
    _tell(step)
    changed = found.changes[:-1] != 0 if any(m.options.bound for m, _ in batch) else found.changes
    snapshots = []
    for i, (member, weight) in enumerate(batch):
        member.saw(weight)
        member.note_vectors()
        sigma = found.sigmas[i] if copies else None
        estimate = None
        if member.options.bound:
            sigma, estimate = certified(member, member.operand(weight).detach(), changed, i), sigma
        if sigma is None or not copies:
            continue
        u, v, group = None, None, None
        if vectors:
            u, v = found.us[i], found.vs[i]
            group = found.groups[i] if member.known_geometry.groups > 1 else None
        snapshots.append(Snapshot(sigma, estimate, u, v, group, None, moment(weight), []))
    return Compared(batch, found.changes, snapshots, alarmed)


def replaced_now(compared: Compared, known: Sequence[Pair]) -> list[Pair]:
    """Those whose weight was replaced, beside the ``known`` ones; waits for the device."""
    members = {member for member, _ in known}
    changes = compared.changes[:-1].tolist()
    return [pair for pair, change in zip(compared.batch, changes) if change == _REPLACED or pair[0] in members]


# -- what the device tells later ---------------------------------------------------------------------------------------


class _Told:
    """A step's alarms on their way to the host."""

    def __init__(self, step: PreparedStep) -> None:
        self.alarms = torch.zeros(len(step.alarms), dtype=torch.int32, pin_memory=True)
        self.arrived: torch.cuda.Event | None = None  # None: nothing is under way


_told: weakref.WeakKeyDictionary[PreparedStep, _Told] = weakref.WeakKeyDictionary()


def _alarmed(step: PreparedStep, batch: list[Pair]) -> list[Pair]:
    flags = _arrived(step)
    if not any(flags):
        return []
    seen = [i for i, flag in enumerate(flags) if flag]
    for i in seen:  # others may have been raised since
        step.alarms[i].zero_()
    return [batch[i] for i in seen]


def _arrived(step: PreparedStep) -> list[int]:
    """Alarms that the host can read without waiting."""
    if not step.alarms.is_cuda:
        return step.alarms.tolist()
    told = _told.get(step)
    if told is None or told.arrived is None or is_capturing(step.alarms.device) or not told.arrived.query():
        return []
    told.arrived = None
    return told.alarms.tolist()


def _tell(step: PreparedStep) -> None:
    if not step.alarms.is_cuda or is_capturing(step.alarms.device):
        return
    told = _told.get(step)
    if told is None:
        told = _told[step] = _Told(step)
    if told.arrived is None:  # else the next time: alarms stay until they were seen
        told.alarms.copy_(step.alarms, non_blocking=True)
        told.arrived = torch.cuda.current_stream(step.alarms.device).record_event()


# -- several streams ---------------------------------------------------------------------------------------------------

_written: dict[int, tuple[int, torch.cuda.Event]] = {}  # by device: the stream that last wrote states, and until when


@contextmanager
def ordered(pairs: Sequence[Pair]) -> Iterator[None]:
    """Have what is written to states of a GPU wait for what another stream writes there."""
    device = next((w.device for _, w in pairs if w.is_cuda), None)
    if device is None or is_capturing(device):
        yield
        return
    stream, index = torch.cuda.current_stream(device), device.index
    last = _written.get(index)
    if last is not None and last[0] != stream.cuda_stream:
        stream.wait_event(last[1])
    try:
        yield
    finally:
        event = torch.cuda.Event() if last is None else last[1]
        event.record(stream)
        _written[index] = stream.cuda_stream, event
