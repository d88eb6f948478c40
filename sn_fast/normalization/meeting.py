"""All ranks come to a collective, or none does: a call that one rank makes alone ends with an error, not a hang."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

PATIENCE = 60.0  # seconds that a rank waits for the others
_GO, _OFF = "go", "off"
_next: dict[str, int] = {}  # of each set of ranks: the number of its next meeting
_last: dict[str, str] = {}  # the key of the last one that took place
_store: list[Any] = []  # the one that these numbers are of


def meet(ranks: Sequence[int], caller: str) -> None:
    """Return on all ``ranks`` once each of them has called this; by the process group's store, without a collective.

    Whether a meeting takes place is one write to the store, which the last to come or the first to give up makes: so
    no rank goes on alone.

    Raises:
        RuntimeError: a rank did not come within ``PATIENCE`` seconds; names ``caller`` and that rank.
    """
    if len(ranks) < 2:
        return
    from torch.distributed import get_rank
    from torch.distributed.distributed_c10d import _get_default_store

    store, rank = _get_default_store(), get_rank()
    if _store != [store]:
        _store[:] = [store]
        _next.clear()
        _last.clear()
    group = ",".join(map(str, ranks))
    deadline = time.monotonic() + PATIENCE
    while True:
        key = f"sn_fast/meeting/{group}/{_next.setdefault(group, 0)}"
        if store.check([f"{key}/end"]) and store.get(f"{key}/end") == _OFF.encode():
            _next[group] += 1  # others have given this one up
            continue
        store.set(f"{key}/{rank}", "here")
        if store.add(f"{key}/count", 1) == len(ranks):
            store.compare_set(f"{key}/end", "", _GO)
        try:
            store.wait([f"{key}/end"], timedelta(seconds=max(1e-3, deadline - time.monotonic())))
        except Exception:  # DistStoreError or RuntimeError, by the kind of store
            store.compare_set(f"{key}/end", "", _OFF)
        ended = store.get(f"{key}/end")
        _next[group] += 1
        last = _last.pop(group, None)
        if ended == _GO.encode():
            if rank == ranks[0]:
                _forget(store, last, ranks)  # all have come here, so nobody reads of the meeting before any more
            _last[group] = key
            return
        absent = [r for r in ranks if not store.check([f"{key}/{r}"])]
        raise RuntimeError(_message(caller, rank, absent))


def _forget(store: Any, key: str | None, ranks: Sequence[int]) -> None:
    if key is not None:
        for name in ("end", "count", *ranks):
            store.delete_key(f"{key}/{name}")


def _message(caller: str, rank: int, absent: list[Any]) -> str:
    who = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}" if absent else "another rank"
    return (
        f"{caller} on rank {rank}: {who} did not call it within {PATIENCE:g} s. It gathers sharded weights, so all "
        "ranks have to call it; a forward of the model brings every layer's sigma up to date by itself"
    )
