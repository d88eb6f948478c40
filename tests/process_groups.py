"""torch.distributed's groups on gloo: of this process alone, or of processes of their own."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist


@contextlib.contextmanager
def process_group(folder: Path, rank: int = 0, size: int = 1) -> Iterator[None]:
    """The default group, while it lasts; ``folder`` is where its members meet, one folder for each group."""
    if not dist.is_available():
        pytest.skip("torch is built without torch.distributed")
    # Its functions take the default group of the time of their import as a default argument: imported later, from
    # FSDP say, they would keep the group, and with it gloo's threads, until the process ends.
    import torch.distributed.nn.functional  # noqa: F401

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_in_group(function: Callable[..., None], *args: object, folder: Path, size: int = 2) -> None:
    """``function(rank, *args)`` in each of ``size`` new processes, which form a group; raises what one raises.

    The function is one of a module, for the processes import it by name.
    """
    if not dist.is_available():
        pytest.skip("torch is built without torch.distributed")
    torch.multiprocessing.spawn(_member, (function, args, folder, size), nprocs=size)


def _member(rank: int, function: Callable[..., None], args: tuple[object, ...], folder: Path, size: int) -> None:
    torch.set_num_threads(1)
    with process_group(folder, rank, size):
        function(rank, *args)
    # Without the interpreter's finalisation: a thread of gloo that frees a tensor asks for the interpreter's lock, from
    # a destructor; during finalisation CPython (before 3.14) ends such a thread, and C++ then aborts the process.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
