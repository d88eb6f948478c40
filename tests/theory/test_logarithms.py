"""Sums by logarithms against the sums themselves, in exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from sn_fast.theory.logarithms import exp, log, log_geometric, log_one_plus, log_sum, raised


@pytest.mark.parametrize("ratio", [0.0, 1e-12, 0.5, 1 - 1e-9, 1.0, 1 + 2**-52, 1 + 1e-9, 2.0, 100.0])
@pytest.mark.parametrize("terms", [1, 2, 15, 100])
def test_geometric_series(ratio, terms):
    exact = sum(Fraction(ratio) ** t for t in range(terms))
    assert log_geometric(log(ratio), terms) == pytest.approx(math.log(exact), rel=1e-12, abs=1e-14)


def test_geometric_series_beyond_float64():
    assert log_geometric(1000.0, 5) == pytest.approx(4000.0)
    assert log_geometric(-1000.0, 5) == 0.0


def test_sums_and_limits():
    assert log_sum([math.log(2), math.log(3), -math.inf]) == pytest.approx(math.log(5))
    assert log_sum([800.0, 800.0]) == pytest.approx(800 + math.log(2))
    assert log_sum([]) == log(0) == log_sum([-math.inf]) == -math.inf
    assert log_one_plus(-math.inf) == 0.0
    assert log_one_plus(math.inf) == math.inf
    assert log_one_plus(-50.0) == pytest.approx(math.exp(-50), rel=1e-12)
    assert log_one_plus(800.0) == 800.0
    assert exp(710.0) == math.inf
    assert 1.0 < raised(1.0) < 1 + 1e-11
