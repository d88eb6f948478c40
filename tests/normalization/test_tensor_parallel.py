"""Normalised layers under tensor parallelism: states, losses and checkpoints are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..process_groups import run_in_group
from . import parallel_cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
        reason="parallelize_module of torch before 2.9 was not tried",
    ),
]


def test_a_transformer_is_that_of_one_process(tmp_path: Path) -> None:
    run_in_group(parallel_cases.as_one, tmp_path, folder=tmp_path)


def test_fully_shard_around_a_tensor_parallel_transformer(tmp_path: Path) -> None:
    run_in_group(parallel_cases.with_fsdp, folder=tmp_path, size=4)
