"""Normalised models under FSDP: the norm in use is that of the weights as they are gathered."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..process_groups import run_in_group
from . import workers

pytestmark = pytest.mark.slow

FSDP1 = [
    "FSDP1, original parameters",
    "FSDP1, flat parameters",
    "FSDP1, original parameters, per block",
    "FSDP1, flat parameters, per block",
    "FSDP1, original parameters, per block, grad op",
    "FSDP1, flat parameters, bfloat16",
]
FSDP2 = ["FSDP2", "FSDP2 per block", "FSDP2 per layer", "FSDP2 per block, kept", "FSDP2 per block, bfloat16"]


def needs(how: str) -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if how.startswith("FSDP2") and not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no fully_shard")


@pytest.mark.parametrize("how", ["FSDP1", "FSDP2 per layer", "FSDP2 root"])
def test_processes_share_one_state(how: str, tmp_path: Path) -> None:
    needs(how)
    run_in_group(workers.sharded, how, folder=tmp_path)


@pytest.mark.parametrize("how", FSDP1 + FSDP2)
def test_training_is_that_of_one_process(how: str, tmp_path: Path) -> None:
    needs(how)
    run_in_group(workers.sharded_as_one, how, folder=tmp_path)


@pytest.mark.parametrize("how", FSDP1[:4] + FSDP2[:3])
def test_a_sharded_model_is_refused(how: str, tmp_path: Path) -> None:
    needs(how)
    run_in_group(workers.sharded_before, how, folder=tmp_path)
