"""DistributedDataParallel: every rank has the state of one process, whatever one of them does alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..process_groups import process_group, run_in_group
from . import replicated
from .models import X, normalised


def test_no_state_is_broadcast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    with process_group(tmp_path):
        real = torch.distributed._broadcast_coalesced
        monkeypatch.setattr(
            torch.distributed,
            "_broadcast_coalesced",
            lambda group, tensors, *rest: (sent.append(sum(t.nbytes for t in tensors)), real(group, tensors, *rest))[1],
        )
        for model, wanted in ((normalised(), 0), (nn.Sequential(normalised(), nn.BatchNorm1d(3)), 32)):
            ddp = DistributedDataParallel(model)
            state = sum(b.nbytes for b in model.buffers())
            weights = sum(p.nbytes for p in model.parameters())
            assert sum(sent) == state + weights  # once, when it is wrapped
            for _ in range(3):
                sent.clear()
                ddp(X).sum().backward()
                assert sum(sent) == wanted
            sent.clear()


def test_ranks_train_as_one_process(tmp_path: Path) -> None:
    run_in_group(replicated.ordinary, folder=tmp_path)


@pytest.mark.slow
def test_every_way_to_wrap_trains_as_one_process(tmp_path: Path) -> None:
    run_in_group(replicated.every_other, folder=tmp_path)
