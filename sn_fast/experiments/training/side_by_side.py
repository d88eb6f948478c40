"""Independent pieces of work at the same time, each in a thread of its own, with the results of one after another.

PyTorch holds Python's lock for a small part of its work: two networks of ``sn-fast train`` take 0.57 of the time that
they take in turn (two cores, one thread of PyTorch each).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


def has_cores_for(threads: int) -> bool:
    """Whether this process may use so many cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) >= threads
    return (os.cpu_count() or 1) >= threads


def side_by_side(work: Sequence[Callable[[], T]], *, at_once: bool) -> list[T]:
    """What each call returns; ``at_once``: the first in this thread, each other in one of its own.

    If calls fail, the error of the first of them is raised, when all have ended. What ends this thread's call from
    outside, such as Ctrl-C, ends the others too.
    """
    if not at_once or len(work) < 2:
        return [call() for call in work]
    others = [_Worker(call) for call in work[1:]]
    try:
        first = work[0]()
        for worker in others:
            worker.wait()
    except BaseException:
        for worker in others:
            worker.stop()
        raise
    return [first, *(worker.result() for worker in others)]


class _Worker(Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._results: list[T] = []
        self._error: BaseException | None = None
        self._torch_threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        torch.set_num_threads(self._torch_threads)  # of this thread too, before its first operation
        try:
            self._results.append(self._call())
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        while self._thread.is_alive():
            self._thread.join(0.1)  # without a limit it would keep signals waiting on Windows

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return self._results[0]

    def stop(self) -> None:
        """End the call as Ctrl-C would, after the operation that it is in."""
        if self._thread.is_alive() and self._thread.ident is not None:
            thread = ctypes.c_ulong(self._thread.ident)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(KeyboardInterrupt))
        self.wait()


class SharedBar:
    """A progress bar that several threads advance."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._lock = threading.Lock()

    def update(self, n: int) -> None:
        with self._lock:
            self._bar.update(n)

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        with self._lock:
            self._bar.set_postfix_str(text, refresh=refresh)
