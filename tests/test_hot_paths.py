"""The counts of the hot paths do not grow: operators, launches, allocations, passes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import hot_paths
from benchmarks.hot_paths import COUNTED, HotPath, counted

STORED = hot_paths.stored()
# PyTorch's own operators differ a little between its versions.
MORE = 1.0 if torch.__version__.split("+")[0] == STORED["torch"] else 1.1


def test_counts_are_those_of_the_operators() -> None:
    x, out = torch.rand(100), torch.empty(100)

    def run() -> None:
        y = x + x  # one tensor twice: reads 1, writes 1, allocates
        y = y.view(10, 10).t()  # looks otherwise at the same memory
        torch.mul(y, y, out=out.view(10, 10))  # reads 1 and out, writes out
        torch.exp(out)  # reads 1, writes 1, allocates

    found = counted(HotPath(run, 100))
    assert found == {"operators": 6, "launches": 3, "allocations": 2, "passes": 7.0}


def test_the_library_s_own_operators_are_looked_into() -> None:
    x = torch.rand(4, 3, 8, 8)
    arguments = (x, x, torch.randn_like(x), "2", 0.1, 0.1, None, None, None, None, False, None)
    found = counted(HotPath(lambda: torch.ops.sn_fast.pgd_step(*arguments), x.numel()))
    assert found["passes"] > 5
    assert found["launches"] > 5


@pytest.fixture(scope="module")
def today() -> dict[str, dict[str, float]]:
    return hot_paths.measure()


def test_all_paths_are_stored(today: dict[str, dict[str, float]]) -> None:
    assert list(today) == list(STORED["paths"])
    assert len(today) == 6


@pytest.mark.parametrize("name", STORED["paths"])
def test_counts_do_not_grow(today: dict[str, dict[str, float]], name: str) -> None:
    most = STORED["paths"][name]
    grown = [f"{today[name][c]:g} {c}, {most[c]:g} stored" for c in COUNTED if today[name][c] > MORE * most[c]]
    assert not grown, f"{name}: {'; '.join(grown)}. If that is meant: python -m benchmarks.hot_paths --store"
