"""method="lanczos": its published formula, its probability, its determinism."""

from __future__ import annotations

import math

import pytest
import torch

from sn_fast import ConvOperator, MatrixOperator, operator_norm_bound
from sn_fast.norms.lanczos_bound import lanczos_bound

from .truth import SVD, dense_norm


def steps_of(info) -> int:
    return int(info.detail.split()[0])


@pytest.mark.parametrize(("tightness", "delta"), [(1.01, 1e-6), (1.05, 1e-6), (1.2, 0.5), (1.01, 0.5)])
def test_the_number_of_steps_is_the_published_one(tightness: float, delta: float) -> None:
    """The smallest m with 1 / sqrt(1 - eps) <= tightness, sqrt(eps) = ln(1.648 sqrt(n) / delta) / (2 m - 1)."""
    op = ConvOperator(torch.randn(2, 3, 3, 3), (20, 20), padding=1)
    _, info = operator_norm_bound(op, method="lanczos", tightness=tightness, delta=delta, return_info=True)
    n = 2 * 20 * 20  # the smaller space

    def excess(m: int) -> float:
        root = math.log(1.648 * math.sqrt(n) / delta) / (2 * m - 1)
        return 1 / math.sqrt(1 - root**2) if root < 1 else math.inf

    assert excess(steps_of(info)) <= tightness < excess(steps_of(info) - 1)
    assert info.confidence == 1 - delta


def test_groups_share_delta() -> None:
    def steps(groups: int, delta: float) -> int:
        op = ConvOperator(torch.randn(8 * groups, 1, 3, 3), (10, 10), padding=1, groups=groups)
        return lanczos_bound(op, 1.01, delta, None)[1]

    assert steps(8, 1e-6) == steps(1, 1e-6 / 8)
    assert steps(8, 1e-6) > steps(1, 1e-6)


def test_the_excess_is_the_formula() -> None:
    """The bound over the norm, where Lanczos has converged."""
    op = MatrixOperator(torch.diag(torch.cat([torch.tensor([2.0]), torch.linspace(0, 1, 399)]).double()))
    for delta in (1e-6, 0.5):
        value, info = operator_norm_bound(op, method="lanczos", tightness=1.1, delta=delta, return_info=True)
        root = math.log(1.648 * math.sqrt(400) / delta) / (2 * steps_of(info) - 1)
        assert float(value) == pytest.approx(2 / math.sqrt(1 - root**2), rel=1e-3)
        assert float(value) >= 2


def test_deterministic_with_a_generator_and_fresh_without() -> None:
    op = ConvOperator(torch.randn(4, 4, 3, 3), (9, 9), padding=1)

    def value(seed: int | None) -> float:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return float(operator_norm_bound(op, method="lanczos", tightness=1.2, generator=generator))

    assert value(5) == value(5)
    assert value(5) != value(6)
    assert value(None) != value(None)


def test_it_starts_in_the_smaller_space_and_stops_there() -> None:
    for shape in ((3, 200), (200, 3)):
        op = MatrixOperator(torch.randn(shape))
        value, info = operator_norm_bound(op, method="lanczos", return_info=True)
        assert steps_of(info) == 3
        assert dense_norm(op) * (1 - SVD) <= float(value) <= dense_norm(op) * (1 + 1e-8)


def test_no_violation_in_two_thousand_small_operators() -> None:
    for trial in range(2000):
        m, n = torch.randint(1, 12, (2,)).tolist()
        weight = torch.randn(m, n, dtype=torch.float64)
        if trial % 3 == 0:
            weight = weight[:, :1] * weight[:1]  # rank one
        if trial % 3 == 1:
            weight *= torch.logspace(0, -trial % 16, n, dtype=torch.float64)
        op = MatrixOperator(weight)
        assert float(operator_norm_bound(op, method="lanczos")) >= dense_norm(op) * (1 - SVD)


def test_no_violation_where_lanczos_has_not_converged() -> None:
    """Spectra that are hard for it: the largest value alone, just above a continuum."""
    generator = torch.Generator().manual_seed(0)
    for delta, allowed in ((1e-6, 0), (0.5, 100)):
        below = 0
        for gap in torch.logspace(-5, -1, 20).tolist():
            values = torch.linspace(0, 1, 300, dtype=torch.float64)
            values[-1] = 1 + gap
            op = MatrixOperator(torch.diag(values))
            for _ in range(10):
                value = operator_norm_bound(op, method="lanczos", tightness=1.1, delta=delta, generator=generator)
                below += float(value) < 1 + gap
        assert below <= allowed


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_any_geometry(mode: str) -> None:
    for transposed in (False, True) if mode == "zeros" else (False,):
        op = ConvOperator(
            torch.randn(4, 2, 3, 3), (7, 8), stride=2, padding=1, groups=2, padding_mode=mode, transposed=transposed
        )
        value = float(operator_norm_bound(op, method="lanczos"))
        assert dense_norm(op) * (1 - SVD) <= value <= dense_norm(op) * 1.0101
