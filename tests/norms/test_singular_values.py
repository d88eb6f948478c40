"""singular_values against the dense SVD."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from sn_fast import ConvergenceWarning, ConvOperator, MatrixOperator, singular_values

from ..layers.geometries import Case, cases
from ..on_device import DEVICE

svd_module = sys.modules["sn_fast.norms.singular_values"]  # its function has the same name


def dense(op, k: int) -> torch.Tensor:
    return torch.linalg.svdvals(op.to_dense().double())[:k]


@pytest.fixture
def iterate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no operator were small enough for the SVD."""
    monkeypatch.setattr(svd_module, "_SMALL", 0)


@settings(max_examples=100)
@given(cases(max_size=6))
def test_small_operators_are_decomposed(case: Case) -> None:
    op = case.operator()
    most = min(op.to_dense().shape)
    for k in {1, min(3, most)}:
        torch.testing.assert_close(singular_values(op, k), dense(op, k), rtol=1e-10, atol=1e-10)


@settings(max_examples=30)
@given(cases(max_size=6))
def test_the_iteration_finds_the_largest_in_any_geometry(case: Case) -> None:
    op = case.operator()
    before, svd_module._SMALL = svd_module._SMALL, 0
    try:
        torch.testing.assert_close(singular_values(op), dense(op, 1), rtol=1e-5, atol=1e-5)
    finally:
        svd_module._SMALL = before


@pytest.mark.parametrize("rank", [1, 2])
def test_a_large_matrix_of_low_rank(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1100, rank, generator=generator) @ torch.randn(rank, 1100, generator=generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)  # that the third is zero is known at once
        values = singular_values(MatrixOperator(weight), 3)
    torch.testing.assert_close(values, torch.linalg.svdvals(weight)[:3], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1},
        {"padding": 1, "stride": 2},
        {"padding": 1, "groups": 3},
        {"padding": 1, "padding_mode": "reflect"},
        {"stride": 2, "transposed": True},
    ],
)
@pytest.mark.parametrize("k", [1, 5])
def test_the_iteration_on_convolutions(options: dict[str, Any], dtype: torch.dtype, k: int, iterate: None) -> None:
    op = ConvOperator(torch.randn(6, 6 // options.get("groups", 1), 3, 3, dtype=dtype), (10, 9), **options)
    values = singular_values(op, k)
    assert values.shape == (k,)
    assert values.dtype == dtype
    torch.testing.assert_close(values.double(), dense(op, k), rtol=2e-5, atol=0)
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("k", [1, 5, 9])
def test_multiple_values(k: int, iterate: None) -> None:
    """Nine equal groups, each value nine times; and a matrix whose top value is fivefold."""
    weight = torch.randn(1, 1, 3, 3, dtype=torch.float64).expand(9, 1, 3, 3)
    op = ConvOperator(weight, (8, 8), padding=1, groups=9)
    torch.testing.assert_close(singular_values(op, k), dense(op, k), rtol=1e-6, atol=0)
    q = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q
    r = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q
    spectrum = torch.cat([torch.full((5,), 3.0), torch.linspace(2, 0, 55)]).double()
    op = MatrixOperator(q @ torch.diag(spectrum) @ r)
    torch.testing.assert_close(singular_values(op, k), spectrum[:k], rtol=1e-6, atol=0)


def test_a_symmetric_layer_has_pairs(iterate: None) -> None:
    """A circular layer's values come in pairs, theta and -theta."""
    op = ConvOperator(torch.randn(2, 2, 3, dtype=torch.float64), 64, padding=1, padding_mode="circular")
    values = singular_values(op, 6)
    torch.testing.assert_close(values, dense(op, 6), rtol=1e-5, atol=0)
    assert (values.diff().abs() < 1e-4 * values[0]).sum() >= 2


def test_more_values_than_one_group_has(iterate: None) -> None:
    op = ConvOperator(torch.randn(20, 1, 1, dtype=torch.float64), 24, groups=20)
    torch.testing.assert_close(singular_values(op, 30), dense(op, 30), rtol=1e-5, atol=0)
    small = MatrixOperator(torch.randn(4, 3))
    torch.testing.assert_close(singular_values(small, 3).double(), dense(small, 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    op = MatrixOperator(torch.randn(20, 30).to(dtype))
    values = singular_values(op, 4)
    assert values.dtype == torch.float32
    exact = torch.linalg.svdvals(op.weight.double())[:4]
    torch.testing.assert_close(values.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    op = MatrixOperator(torch.randn(9, 7))
    scaled = MatrixOperator(op.weight * scale)
    torch.testing.assert_close(singular_values(scaled, 3).double() / scale, dense(op, 3), rtol=1e-5, atol=0)


def test_zero_operators(iterate: None) -> None:
    assert singular_values(MatrixOperator(torch.zeros(30, 20)), 3).tolist() == [0, 0, 0]
    weight = torch.randn(30, 1) * torch.randn(1, 20)
    values = singular_values(MatrixOperator(weight), 3)
    torch.testing.assert_close(values[0], weight.norm())
    assert (values[1:] < 1e-5 * values[0]).all()


def test_equal_calls_give_equal_results_and_leave_the_global_generator_alone(iterate: None) -> None:
    op = MatrixOperator(torch.randn(60, 50, requires_grad=True))
    state = torch.get_rng_state()
    values = singular_values(op, 3)
    assert not values.requires_grad
    assert torch.equal(values, singular_values(op, 3))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(values, singular_values(op, 3))
    assert torch.equal(torch.get_rng_state(), state)
    other = singular_values(op, 3, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(values, other, rtol=1e-5, atol=0)


def test_a_value_larger_than_the_svd_handles_by_iteration() -> None:
    """2^20 elements and more are iterated on."""
    op = MatrixOperator(torch.randn(1100, 960) * torch.linspace(0, 1, 960) ** 4)
    torch.testing.assert_close(singular_values(op, 2).double(), dense(op, 2), rtol=1e-5, atol=0)


def test_not_converged_warns_how_far(iterate: None) -> None:
    op = MatrixOperator(torch.randn(100, 100, dtype=torch.float64))
    with pytest.warns(
        ConvergenceWarning,
        match=r"singular_values\(k=3\) stopped after 2 iterations with .* Remedy: raise max_iterations",
    ):
        values = singular_values(op, 3, max_iterations=2, tol=1e-9)
    assert (values <= dense(op, 3) * (1 + 1e-12)).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        singular_values(op, 3)


@pytest.mark.parametrize(
    ("k", "options", "says"),
    [
        (0, {}, "k=0 must be an integer >= 1"),
        (1.5, {}, "k=1.5"),
        (4, {}, r"k=4 exceeds the 3 singular values of MatrixOperator"),
        (1, {"tol": 0}, "tol=0"),
        (1, {"tol": float("nan")}, "tol=nan"),
        (1, {"max_iterations": 0}, "max_iterations=0"),
    ],
)
def test_bad_arguments(k: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        singular_values(MatrixOperator(torch.randn(3, 5)), k, **options)


def test_bad_operators() -> None:
    with pytest.raises(TypeError, match="give an operator"):
        singular_values(torch.randn(3, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN"):
        singular_values(MatrixOperator(torch.full((2, 2), float("nan"))))


def test_too_many_of_a_large_operator() -> None:
    op = ConvOperator(torch.randn(64, 64, 3, 3), (32, 32), padding=1)
    with pytest.raises(ValueError, match=r"k=40000 of 65536 singular values is too many .*; give a smaller k"):
        singular_values(op, 40_000)
