"""A failure in one process of a group fails the test; what happens after its success does not."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from .process_groups import run_in_group

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


def _fine(rank: int, folder: Path) -> None:
    atexit.register(os.abort)  # stands for threads of torch that meet a finalised interpreter
    total = torch.tensor(rank + 1.0)
    dist.all_reduce(total)
    assert total == 3
    import torch.distributed.nn.functional as late

    assert dist.group.WORLD is not None
    assert dist.group.WORLD not in late.all_reduce.__defaults__  # it would outlive destroy_process_group
    (folder / f"{rank}").touch()


def _raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("of the second process")
    dist.barrier()  # which the second never enters


def _asserts_at_the_end(rank: int) -> None:
    dist.barrier()
    assert rank == 1, "of the first process"


def _exits(rank: int) -> None:
    if rank == 1:
        os._exit(3)


def _aborts(rank: int) -> None:
    if rank == 1:
        os.abort()


def test_each_process_runs_and_its_exit_is_not_judged(tmp_path: Path) -> None:
    run_in_group(_fine, tmp_path, folder=tmp_path)
    assert (tmp_path / "0").exists()
    assert (tmp_path / "1").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (_raises, ProcessRaisedException, "of the second process|Connection"),  # the other's, if that is seen first
        (_asserts_at_the_end, ProcessRaisedException, "of the first process"),
        (_exits, ProcessExitedException, "exit code 3"),
        (_aborts, ProcessExitedException, "SIGABRT"),
    ],
)
def test_a_failure_in_one_process_is_raised(
    function: Callable[[int], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run_in_group(function, folder=tmp_path)
