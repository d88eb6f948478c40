"""Normalised models under FSDP: the norm in use is that of the weights as they are gathered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..process_groups import run_in_group
from . import sharded_cases, workers
from .sharded_cases import Case

pytestmark = pytest.mark.slow
needs_comparable_fsdp2 = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9),
    reason="on gloo, FSDP2 of torch before 2.9 does not train a plain network right either",
)

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


@pytest.mark.parametrize("hows", [["FSDP1"], ["FSDP2 per layer", "FSDP2 root"]], ids=["FSDP1", "FSDP2"])
def test_processes_share_one_state(hows: list[str], tmp_path: Path) -> None:
    needs(hows[0])
    run_in_group(workers.for_each, workers.sharded, hows, folder=tmp_path)


@pytest.mark.parametrize("hows", [FSDP1, FSDP2], ids=["FSDP1", "FSDP2"])
def test_training_is_that_of_one_process(hows: list[str], tmp_path: Path) -> None:
    needs(hows[0])
    run_in_group(workers.for_each, workers.sharded_as_one, hows, folder=tmp_path)


DOUBLE = torch.float64
TWO = [
    Case("FSDP2", dtype=DOUBLE, steps=100),
    Case("FSDP2", after=True),
    Case("FSDP2 per block", after=True, dtype=DOUBLE, mode="cap", steps=100),
    Case("FSDP2 per layer", after=True, accumulate=3, forwards=2),
    Case("FSDP2 per block resharded", accumulate=2, forwards=2, dtype=DOUBLE),
    Case("FSDP2 per block kept", after=True),
    Case("FSDP2 per block recomputed", after=True, dtype=DOUBLE),
    Case("FSDP2 per block offload", after=True),
    Case("FSDP2 per block", low=True),
    Case("FSDP2 per block recomputed", low=True, after=True, forwards=2),
    Case("FSDP1", after=True, dtype=DOUBLE),
    Case("FSDP1 per block", after=True, accumulate=2, forwards=2),
    Case("FSDP1 per layer grad op recomputed", after=True),
    Case("FSDP1 per block", low=True, after=True),
    Case("FSDP1 flat per block"),
]
THREE = [
    Case("FSDP2 per block", dtype=DOUBLE),
    Case("FSDP2 per layer", after=True),
    Case("FSDP1 per block", after=True, dtype=DOUBLE),
]


@needs_comparable_fsdp2
@pytest.mark.parametrize(("cases", "size"), [(TWO, 2), (THREE, 3)], ids=["two", "three"])
def test_losses_are_those_of_one_process(cases: list[Case], size: int, tmp_path: Path) -> None:
    run_in_group(sharded_cases.as_one, cases, folder=tmp_path, size=size)


@needs_comparable_fsdp2
def test_outside_a_forward_and_kept_bytes(tmp_path: Path) -> None:
    cases = [Case("FSDP2 per block", after=True), Case("FSDP2"), Case("FSDP1 per layer", after=True)]
    run_in_group(sharded_cases.outside, cases, folder=tmp_path)


def test_what_no_parametrization_can_rename_is_refused(tmp_path: Path) -> None:
    needs("FSDP2")
    run_in_group(workers.refused, folder=tmp_path)


def test_layers_that_are_gathered_together_are_refreshed_in_one_call(tmp_path: Path) -> None:
    needs("FSDP2")
    run_in_group(workers.refreshed_together, folder=tmp_path)
