"""Paired times: candidates take turns, so that what else the machine does falls on all of them alike.

Two clocks: the wall's, and the time that this process had on a processor, which other processes lengthen far less. With
one thread and an idle machine they agree. Ratios are taken within a turn, and their median over the turns.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Run = Callable[[], object]


def paired(
    candidates: Mapping[str, Run],
    *,
    turns: int = 9,
    budget: float = 10.0,
    before: Mapping[str, Run] | None = None,
    calls: int = 1,
    least: int = 3,
    warm: bool = True,
    clock: str = "cpu_ms",
) -> dict[str, dict[str, Any]]:
    """Milliseconds per call of each candidate.

    Args:
        candidates: by name; the first is what the ratios of the others are to.
        turns: of each candidate at most, and ``least`` at least.
        budget: seconds after which no further turn starts.
        before: what a candidate does before its turn, outside the time.
        calls: of a candidate in one turn, for those that take microseconds.
        warm: run each once before the first turn; not for those that take many seconds.
        clock: of the ratios, "cpu_ms" or "wall_ms".

    Returns:
        By name: ``wall_ms`` and ``cpu_ms``, each with least, median and quartiles; ``ratio``, the same of this
        candidate over the first by ``clock``; ``turns``.
    """
    wall: dict[str, list[float]] = {name: [] for name in candidates}
    cpu: dict[str, list[float]] = {name: [] for name in candidates}
    names = list(candidates)
    for name in names if warm else ():  # allocators and caches
        _before(before, name)
        candidates[name]()
    start = time.perf_counter()
    for turn in range(turns):
        if turn >= least and time.perf_counter() - start > budget:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            _before(before, name)
            run = candidates[name]
            with _no_collection():
                first, first_cpu = time.perf_counter_ns(), time.process_time_ns()
                for _ in range(calls):
                    run()
                wall[name].append((time.perf_counter_ns() - first) / 1e6 / calls)
                cpu[name].append((time.process_time_ns() - first_cpu) / 1e6 / calls)
    times = cpu if clock == "cpu_ms" else wall
    base = times[names[0]]
    return {
        name: {
            "wall_ms": spread(wall[name]),
            "cpu_ms": spread(cpu[name]),
            "ratio": spread([mine / other for mine, other in zip(times[name], base)]),
            "turns": len(base),
        }
        for name in names
    }


def spread(values: list[float]) -> dict[str, float]:
    """Least, quartiles and median, to four digits."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        name: float(f"{value:.4g}")
        for name, value in (("min", min(values)), ("q1", low), ("median", middle), ("q3", high))
    }


def like_a_long_process() -> None:
    """Let the C library keep the memory of large tensors, as it does in a process that has freed larger ones.

    In a fresh process it gives a tensor of some 100 KB back to the system, and each of its pages costs as much again as
    the arithmetic: to the advantage of whoever allocates least.
    """
    torch.zeros(7_900_000)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python collects no garbage within this context: whose turn it fell on would be chance."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _before(before: Mapping[str, Run] | None, name: str) -> None:
    if before and name in before:
        before[name]()
