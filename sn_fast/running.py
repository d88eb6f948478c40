"""What commands that take a while share: the progress bar, the number of threads, and the limit on memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import torch

from .errors import require

MOST_THREADS = 1024
"""More than any machine runs at once; where the system cannot start a thread, PyTorch ends the process."""
_SECONDS_BETWEEN_LINES = 10.0  # of a progress bar that is written to a file


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """PyTorch with this many threads. Sums depend in their last bits on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def memory_limited(device: torch.device) -> Iterator[None]:
    """Within this context an allocation beyond the machine's memory fails, where Linux would kill the process later."""
    limit = _memory_limit() if device.type == "cpu" else None
    if limit is None:
        yield
        return
    import resource

    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [value for value in (limit, before, most) if value != resource.RLIM_INFINITY]
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), most))
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))


def _memory_limit() -> int | None:
    """Bytes that this process may have: what it has, and what is free; None where Linux does not say."""
    try:
        own = _kilobytes("/proc/self/status", "VmData:")
        free = _kilobytes("/proc/meminfo", "MemAvailable:") + _kilobytes("/proc/meminfo", "SwapFree:")
    except (OSError, StopIteration, ValueError):
        return None
    limit = 1024 * (own + free)
    try:
        group = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    except OSError:
        group = "max"
    return limit if not group.isdigit() else min(limit, max(int(group), 1024 * own))


def _kilobytes(file: str, name: str) -> int:
    with open(file, encoding="ascii") as lines:
        return int(next(line for line in lines if line.startswith(name)).split()[1])


def notice(text: str) -> None:
    """One line on stderr about something unusual that is put right."""
    if sys.stderr is not None:
        print(f"sn-fast: {text}", file=sys.stderr)


def progress_bar(progress: bool, title: str, total: int, done: int = 0) -> Any:
    """A bar of tqdm on stderr: a widget in a notebook, redrawn in a terminal, and elsewhere a line now and then.

    Without ``progress`` one that takes every call and shows nothing.
    """
    if not progress:
        return _NoBar()
    bar = require("tqdm.auto").tqdm
    in_notebook = any(cls.__name__ == "tqdm_notebook" for cls in bar.__mro__)
    redraws = in_notebook or sys.stderr.isatty()
    return bar(
        desc=title,
        total=total,
        initial=done,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",  # fits into 80 columns
        file=sys.stderr if redraws else _Lines(sys.stderr),
        mininterval=0.1 if redraws else _SECONDS_BETWEEN_LINES,
        dynamic_ncols=redraws,
    )


class _Lines:
    """A stream without cursor: what a bar would draw over the last becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> int:
        line = text.strip()
        if line and line != self._last:
            self._stream.write(f"{line}\n")
            self._last = line
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
