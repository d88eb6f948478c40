"""The forwards of whole models that are under way in a thread, and which of their layers' weights are gathered now."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence

from torch import nn

from .prepared import Pair
from .refresh import readable
from .snapshot import is_current
from .state import State


class _Threads(threading.local):
    def __init__(self) -> None:
        self.forwards: list[tuple[weakref.ref[nn.Module], list[weakref.ref[State]], dict[int, int]]] = []


_threads = _Threads()


def begin(model: nn.Module, members: Sequence[State]) -> None:
    """A forward of ``model`` begins, with these sharded layers in the order of its modules."""
    places = {id(member): i for i, member in enumerate(members)}
    _threads.forwards.append((weakref.ref(model), [weakref.ref(m) for m in members], places))


def end(model: nn.Module) -> None:
    """It has ended, and so have those within it that an interrupt left open."""
    for i, (reference, _, _) in enumerate(_threads.forwards):
        if reference() is model:
            del _threads.forwards[i:]
            return


def gathered_beside(member: State) -> list[Pair]:
    """The layers around ``member`` in the forward under way whose weights are whole now and have no state handed out.

    As far as they follow one another: a block that ``fully_shard`` was called for is gathered, and freed, as one.
    FSDP1's weights are not looked at: one that is still on its way looks as if it had come.
    """
    if not _threads.forwards:
        return []
    _, members, places = _threads.forwards[-1]
    place = places.get(id(member))
    if place is None or members[place]() is not member:
        return []
    found: list[Pair] = []
    for indices in (range(place + 1, len(members)), range(place - 1, -1, -1)):
        for i in indices:
            other = members[i]()
            pair = readable([other]) if other is not None and other.is_plain else []
            if not pair:
                break
            if other.current is None or not is_current(other.current, pair[0][1]):  # type: ignore[union-attr]
                found += pair
    return found
