"""Tables of the kernels: their life, and what a CUDA graph does to it."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch

from sn_fast.ops import tables
from sn_fast.ops.tables import Tables

CPU = torch.device("cpu")


def some() -> Tables:
    records = np.zeros(3, np.dtype([("a", "<i4"), ("b", "<i4", 2)]))
    records["b"][1] = 4, 5
    return Tables([records, np.arange(5, dtype=np.int32)], CPU)


def test_arrays_arrive_as_integers() -> None:
    made = some()
    assert made[0].tolist() == [0, 0, 0, 0, 4, 5, 0, 0, 0]
    assert made[1].tolist() == [0, 1, 2, 3, 4]
    assert len(set(made.addresses())) == 2


@pytest.mark.parametrize("captured", [False, True])
def test_what_a_graph_reads_is_kept(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    monkeypatch.setattr(tables, "_CAPTURED", {})
    made = some()
    with monkeypatch.context() as patch:
        patch.setattr(tables, "is_capturing", lambda device: captured)
        made.addresses()
        made.addresses()
    assert len(tables._CAPTURED) == captured
    reference = weakref.ref(made)
    del made
    gc.collect()
    assert (reference() is not None) == captured


def test_a_capture_cannot_be_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="Remedy: run the same call once before the capture"):
        some()


def test_memory_is_not_of_the_callers_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile's graphs take over what the thread allocates while they warm up."""
    import threading

    threads = set()
    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda a: threads.add(threading.get_ident()) or from_numpy(a))
    some()
    assert threads
    assert threading.get_ident() not in threads
