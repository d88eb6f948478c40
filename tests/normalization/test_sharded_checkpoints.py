"""Checkpoints of sharded models: saved on two processes, loaded on one and on four."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..process_groups import run_in_group
from . import sharded_checkpoints

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
        reason="on gloo, FSDP2 of torch before 2.9 does not train a plain network right either",
    ),
]


def test_training_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    for name in ("saving", "killed", "one", "four"):
        (tmp_path / name).mkdir()
    run_in_group(sharded_checkpoints.save, tmp_path, folder=tmp_path / "saving", size=2)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):  # and the others end, too
        run_in_group(sharded_checkpoints.killed, tmp_path, folder=tmp_path / "killed", size=2)
    run_in_group(sharded_checkpoints.load, tmp_path, folder=tmp_path / "one", size=1)
    run_in_group(sharded_checkpoints.load, tmp_path, folder=tmp_path / "four", size=4)
