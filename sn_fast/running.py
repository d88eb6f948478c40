"""What commands that take a while share: the progress bar, and the number of threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .errors import require


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """PyTorch with this many threads. Sums depend in their last bits on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def progress_bar(progress: bool, title: str, total: int, done: int = 0) -> Any:
    """A bar of tqdm on stderr; without ``progress`` one that takes every call and shows nothing."""
    if not progress:
        return _NoBar()
    # Where there is no terminal to redraw, every update is a line more.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    return require("tqdm").tqdm(
        desc=title,
        total=total,
        initial=done,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",  # fits into 80 columns
        file=sys.stderr,
        mininterval=interval,
        dynamic_ncols=True,
    )


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
