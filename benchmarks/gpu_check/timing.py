"""Times: candidates side by side in one process, medians and quartiles, with the L2 cache emptied in between.

On the CPU (a rehearsal) the same code runs on the host clock, and graphs are plain calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Action = Callable[[], Any]
_WARM_UPS = 3


class Timer:
    """Takes times on one device."""

    def __init__(self, device: str, repeats: int) -> None:
        self.cuda = device == "cuda"
        self.repeats = repeats
        self._flush: torch.Tensor | None = None
        if self.cuda:
            # Writing four times the cache leaves nothing of what was in it.
            size = max(4 * torch.cuda.get_device_properties(0).L2_cache_size, 128 << 20)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def flush(self) -> None:
        """Empty the L2 cache."""
        if self._flush is not None:
            self._flush.zero_()

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def on_device(self, actions: Mapping[str, Action], *, inner: int = 1, flush: bool = True) -> dict[str, Any]:
        """Microseconds on the device of one call of each action, between two events on the stream.

        ``inner`` calls follow one another between the events: for actions much shorter than the events are exact, and
        whose data is in the cache anyway (``flush=False``).
        """
        if not self.cuda:
            return self.on_host(actions, inner=inner)
        self._warm_up(actions)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in actions}
        for i in range(self.repeats):
            for name, action in _rotated(actions, i):
                if flush:
                    self.flush()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(inner):
                    action()
                end.record()
                events[name].append((start, end))
        self.synchronize()
        return {n: quartiles([a.elapsed_time(b) * 1000 / inner for a, b in pairs]) for n, pairs in events.items()}

    def on_host(self, actions: Mapping[str, Action], *, inner: int = 1) -> dict[str, Any]:
        """Microseconds from the call to the end of its work on the device, on the host clock: what a caller waits."""
        self._warm_up(actions)
        times: dict[str, list[float]] = {name: [] for name in actions}
        for i in range(self.repeats):
            for name, action in _rotated(actions, i):
                self.flush()
                self.synchronize()
                start = time.perf_counter()
                for _ in range(inner):
                    action()
                self.synchronize()
                times[name].append((time.perf_counter() - start) * 1e6 / inner)
        return {name: quartiles(values) for name, values in times.items()}

    def graph(self, action: Action, times: int = 1) -> Action:
        """A CUDA graph of ``times`` calls, as a function that replays it."""
        if not self.cuda:
            return lambda: [action() for _ in range(times)][-1]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                action()
        torch.cuda.current_stream().wait_stream(stream)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                action()
        return graph.replay

    def _warm_up(self, actions: Mapping[str, Action]) -> None:
        for action in actions.values():
            for _ in range(_WARM_UPS if self.cuda else 1):
                action()
        self.synchronize()


def _rotated(actions: Mapping[str, Action], by: int) -> list[tuple[str, Action]]:
    """In another order each time, so that no candidate always follows the same one."""
    items = list(actions.items())
    by %= len(items)
    return items[by:] + items[:by]


def quartiles(values: list[float]) -> dict[str, float]:
    """Median, first and third quartile, and how many."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {"median": round(median, 3), "low": round(low, 3), "high": round(high, 3), "n": len(values)}


def ratio(a: dict[str, float], b: dict[str, float]) -> float:
    """Of two medians."""
    return digits(a["median"] / b["median"])


def digits(value: float) -> float:
    """Four significant ones."""
    return float(f"{value:.4g}")
