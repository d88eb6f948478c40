"""Operators whose weight is not here, on the meta device or shared by processes: one error that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sn_fast
from sn_fast import LinearOperator, operator_of

from ..process_groups import process_group

MEASURES: list[Callable[[LinearOperator], Any]] = [
    sn_fast.operator_norm,
    sn_fast.operator_norm_bound,
    sn_fast.operator_norm_interval,
    sn_fast.singular_values,
]
USES: list[Callable[[LinearOperator], LinearOperator]] = [
    lambda a: a,
    lambda a: a.T,
    lambda a: -3 * a.T,
    lambda a: a.T @ a,
    lambda a: a + 2 * a,
]
LAYERS: list[Callable[[], Any]] = [
    lambda: nn.Linear(6, 5),
    lambda: nn.Conv2d(2, 3, 3, padding=1, groups=1),
    lambda: nn.ConvTranspose2d(2, 3, 3, stride=2),
]


def size(layer: Any) -> tuple[int, int] | None:
    return None if isinstance(layer, nn.Linear) else (6, 6)


@pytest.mark.parametrize("measure", MEASURES)
def test_on_meta(measure: Callable[[LinearOperator], Any]) -> None:
    for make in LAYERS:
        with torch.device("meta"):
            layer = make()
        for use in USES:
            with pytest.raises(ValueError, match="is on the meta device and has no values; load or initialise"):
                measure(use(operator_of(layer, size(layer))))


def test_shared_by_processes(tmp_path: Path) -> None:
    with process_group(tmp_path):
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        for make, place in zip(LAYERS, (Shard(0), Replicate(), Shard(1))):
            layer = make()
            weight = distribute_tensor(layer.weight.detach(), mesh, [place])
            layer.weight = nn.Parameter(weight)
            operator = operator_of(layer, size(layer))
            for measure in MEASURES:
                for use in USES:
                    with pytest.raises(ValueError, match=r"is a DTensor, .* give weight\.full_tensor\(\), called on"):
                        measure(use(operator))
            x = torch.zeros(1, 6) if isinstance(layer, nn.Linear) else torch.zeros(1, 2, 6, 6)
            with pytest.raises(ValueError, match=r"'0\.weight' is a DTensor, .* give the model with whole weights"):
                sn_fast.lipschitz_bound(nn.Sequential(layer), x)
            layer.weight = nn.Parameter(weight.full_tensor())
            assert float(sn_fast.operator_norm(operator_of(layer, size(layer)))) > 0
