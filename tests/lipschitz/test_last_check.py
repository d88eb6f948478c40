"""Slopes of the model itself, where no graph shows what it does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sn_fast.lipschitz import lipschitz_bound, rules

from .truth import Apply, bound_of, report_of


def test_a_branch_that_tracing_does_not_take() -> None:
    def f(x: Tensor) -> Tensor:
        return x if isinstance(x, torch.fx.Proxy) else 5 * x

    with pytest.warns(UserWarning, match="something else"):
        assert math.isinf(bound_of(f, torch.zeros(1, 3)))


def test_a_model_with_a_memory() -> None:
    class Counts(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.calls * x

    with pytest.warns(UserWarning, match="something else"):
        assert math.isinf(lipschitz_bound(Counts(), torch.zeros(1, 3)).bound)


def test_a_bound_below_a_slope_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = rules.Entry(lambda call: 0.5, rules.Depends.FIRST)
    monkeypatch.setitem(rules._NAMES, "abs", entry)
    report = report_of(Apply(abs), torch.randn(1, 3))
    assert math.isinf(report.bound)
    assert "slope of" in report.reason
