"""The processes of torchrun that share a run: each takes a part of every batch, the first writes the files."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ...errors import UserError
from .shared_batch_norm import share_statistics


class Ranks:
    """One of ``size`` processes, each of which runs the same code on its part of every batch."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size
        self._told = size == 1

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def part(self, x: Tensor) -> Tensor:
        """This process's samples of a batch; none if the batch is smaller than the number of processes."""
        return x if self.size == 1 else x[self.rank :: self.size]

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model, with gradients that are means over the processes.

        Statistics of batch normalisation are those of the whole batch. With u, v and sigma they are the same in all
        processes by construction, so no buffer is sent.
        """
        if self.size == 1:
            return model
        share_statistics(model)
        sends = "forward_sync_buffers"  # the name since torch 2.14
        if sends not in inspect.signature(DistributedDataParallel.__init__).parameters:
            sends = "broadcast_buffers"
        return DistributedDataParallel(model, **{sends: False})  # type: ignore[arg-type]

    def summed(self, values: Sequence[float], device: torch.device) -> list[float]:
        """Each value, summed over the processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Within this context the leader opens the run's folder; if that fails, the others end too."""
        try:
            yield
        except BaseException:
            self._tell(None)
            raise

    def tell(self, folder: Path) -> None:
        """Leader: the others may work in ``folder`` now."""
        self._tell(str(folder))

    def told(self) -> Path:
        """The others: the folder that the leader has opened.

        Raises:
            UserError: it could not.
        """
        message: list[str | None] = [None]
        dist.broadcast_object_list(message, src=0)
        if message[0] is None:
            raise UserError("the first process has ended with an error, which it has reported")
        return Path(message[0])

    def _tell(self, message: str | None) -> None:
        if not self._told:
            self._told = True
            dist.broadcast_object_list([message], src=0)


ALONE = Ranks()


def is_of_torchrun() -> bool:
    """Whether torchrun, or what sets the environment as it does, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def store_of_attempt() -> tuple[dist.Store, int, int]:
    """Where the processes of torchrun meet, this one's rank, and their number.

    torchrun can keep its store for the processes that it starts anew, and in it the addresses of those that have died.
    On one node each attempt has keys of its own. Nodes can differ in how many restarts they count, so on several the
    keys stay, and torchrun has to open a new store: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if attempt is not None and os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"attempt {attempt}", store)
    return store, rank, size


@contextmanager
def ranks_of_torchrun(device: str) -> Iterator[Ranks]:
    """The processes that torchrun has started, as a group for as long as this context lasts.

    Raises:
        UserError: torchrun has not started this process.
    """
    if not is_of_torchrun():
        raise UserError("RANK and WORLD_SIZE are not set in the environment; start the program with torchrun")
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    store, rank, size = store_of_attempt()
    dist.init_process_group("nccl" if on_cuda else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
