"""SpectralProjection of sharded weights: equal to one process, equal on all ranks, and little is sent."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from ..process_groups import run_in_group
from . import projection_workers as workers

pytest.importorskip("torch.distributed.fsdp")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def left_by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that ``workers.on_two`` has filled; it raises where two processes are not as one."""
    meeting, results = tmp_path_factory.mktemp("meeting"), tmp_path_factory.mktemp("results")
    run_in_group(workers.on_two, results, folder=meeting, size=2)
    return results


def test_two_processes_are_as_one_and_a_checkpoint_of_theirs_loads_in_one(left_by_two: Path) -> None:
    workers.loaded_on_one(left_by_two)


def test_three_processes_with_uneven_parts_are_as_one(tmp_path: Path) -> None:
    run_in_group(workers.equal_to_one_process, ["FSDP2", "FSDP1"], folder=tmp_path, size=3)


def test_four_processes_in_two_dimensions_are_as_one(tmp_path: Path) -> None:
    run_in_group(workers.equal_to_one_process, ["HSDP", "FSDP2 and TP"], folder=tmp_path, size=4)


def sent_by_formula(model: nn.Module, sizes: dict[str, tuple[int, int]]) -> int:
    """Numbers in one iteration's sum: of each layer A^T A v, |A v|^2 and |A v|, or the weight where that is smaller."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            total += module.weight.numel() if module.out_features == 1 else module.in_features + 2
        elif isinstance(module, nn.Conv2d):
            inputs = module.in_channels * (1 if module.kernel_size == (1, 1) else sizes[name][0] * sizes[name][1])
            total += module.weight.numel() if module.weight.numel() <= inputs else inputs + 2
    return total


@pytest.mark.parametrize(("name", "share"), [("transformer", 0.01), ("resnet50", 0.10)])
def test_bytes_on_the_wire(name: str, share: float, left_by_two: Path) -> None:
    calls, sent, weights = map(int, (left_by_two / name).read_text().split())
    model = workers.transformer() if name == "transformer" else workers.resnet50()
    sides = {"0": 224, "2": 56, "3": 56, "4": 56, "5": 56, **dict.fromkeys("678", 28), "9": 28}
    sides |= {str(i): 14 for i in range(10, 15)} | {"15": 14} | {"16": 7, "17": 7}
    sizes = {n: (sides[n.split(".")[0]],) * 2 for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert calls == 1
    assert sent == 4 * sent_by_formula(model, sizes)
    # A sum sends every number twice, there and back; gathering the weights sends them once.
    assert 2 * sent <= share * weights
