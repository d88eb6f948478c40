"""The theorem's expression, term by term."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sn_fast.theory import capacity, complexity

from .truth import PARAMETERS

X = torch.zeros(1, 4, dtype=torch.float64)


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("scheme", PARAMETERS)
def test_expression(model, scheme):
    p = PARAMETERS[scheme]
    result = complexity(model, scheme, gamma=0.5, n=1000, delta=0.05, B=2.0, example_input=X, **p)
    phi = capacity(model, scheme, example_input=X, **p)
    steepest = math.sqrt(2) * phi.terms["product"]
    reach = {"erm": 0.0, "fgm": 0.3, "pgm": 0.3, "wrm": steepest / 1e4}[scheme]
    first = (2.0 + reach) ** 2 * 3**2 * 6 * math.log(3 * 6) * float(phi) / (0.5**2 * 1000)
    second = 3 * math.log(3 * 1000 / 0.05) / (0.5**2 * 1000)
    assert result.terms == pytest.approx({"capacity": first, "confidence": second}, rel=1e-9)
    assert float(result) == pytest.approx(math.sqrt(first + second), rel=1e-9)
    assert math.exp(result.log_total) == pytest.approx(float(result))
    assert result.factors["Beff"] == pytest.approx(2.0 + reach)
    assert (result.factors["d"], result.factors["h"]) == (3, 6)
    assert result.capacity.log_total == phi.log_total
    assert result.notes == phi.notes
    assert result.to_dict()["capacity"]["scheme"] == scheme


def test_terms_add_up_to_the_square_of_the_total(model):
    for certified in (False, True):
        result = complexity(
            model, "erm", gamma=1.0, n=100, delta=0.1, B=1.0, h=50, example_input=X, certified=certified
        )
        assert sum(result.terms.values()) == pytest.approx(result.total**2, rel=1e-10)
        assert result.factors["h"] == 50


def test_falls_with_margin_and_samples_and_rises_with_certainty(model):
    def at(**changed: float) -> float:
        given = {"gamma": 1.0, "n": 100, "delta": 0.1, "B": 1.0} | changed
        return float(complexity(model, "erm", example_input=X, **given))

    assert at(gamma=2.0) == pytest.approx(at() / 2)
    assert at(n=400) < at() / 1.9
    assert at(delta=1e-6) > at()
    assert at(B=2.0) > at()


def test_the_gradient_of_the_cross_entropy_is_within_the_default_of_m(model):
    result = complexity(model, "wrm", gamma=1.0, n=10, delta=0.1, B=1.0, lam=1e4, example_input=X)
    x = torch.randn(200, 4, dtype=torch.float64, requires_grad=True)
    loss = nn.functional.cross_entropy(10 * model(x) / 10, torch.zeros(200, dtype=torch.int64), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(gradient.norm(dim=1).max()) <= result.factors["M"]
    given = complexity(model, "wrm", gamma=1.0, n=10, delta=0.1, B=1.0, lam=2.0**40, M=2.0**39, example_input=X)
    assert given.factors["Beff"] == pytest.approx(1.5)


def test_infinite_capacity_is_infinite_complexity(model):
    result = complexity(model, "wrm", gamma=1.0, n=10, delta=0.1, B=1.0, lam=1e-9, example_input=X)
    assert math.isinf(float(result))
    assert "L < lam" in result.capacity.reason


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gamma": 0.0}, "gamma=0.0 must be a finite number > 0"),
        ({"n": 0}, "n=0 must be an integer >= 1"),
        ({"n": 10.5}, "n=10.5 must be an integer >= 1"),
        ({"delta": 1.0}, r"delta=1.0 must be in \(0, 1\)"),
        ({"delta": 0.0}, "delta=0.0 must be"),
        ({"B": -1.0}, "B=-1.0 must be a finite number > 0"),
        ({"h": 0}, "h=0 must be an integer >= 1"),
        ({"M": 1.0}, "M=1.0: scheme='erm' takes none"),
    ],
)
def test_wrong_arguments(model, changed, message):
    with pytest.raises(ValueError, match=message):
        complexity(model, "erm", example_input=X, **{"gamma": 1.0, "n": 10, "delta": 0.1, "B": 1.0, **changed})
