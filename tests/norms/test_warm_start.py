"""operator_norm(start=...): what a warm start saves, and that a bad one does no harm."""

from __future__ import annotations

import warnings

import pytest
import torch

from sn_fast import ConvergenceWarning, ConvOperator, LinearOperator, MatrixOperator, operator_norm

METHODS = ["power", "lanczos", "block"]


def operators() -> list[LinearOperator]:
    double = torch.float64
    return [
        MatrixOperator(torch.randn(40, 30, dtype=double)),
        ConvOperator(torch.randn(4, 3, 3, 3, dtype=double), (9, 8), padding=1),
        ConvOperator(torch.randn(4, 3, 3, dtype=double), 40, stride=4, padding=1),  # windows apart: it is reduced
        ConvOperator(torch.randn(4, 2, 3, 3, dtype=double), (6, 6), stride=2, padding=1, transposed=True),
        ConvOperator(torch.randn(4, 2, 2, dtype=double), 5, stride=3, transposed=True),  # reduced
        ConvOperator(torch.randn(6, 2, 3, dtype=double), 12, padding=1, groups=3, padding_mode="circular"),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_the_converged_vectors_converge_at_once(method: str) -> None:
    for op in operators():
        sigma, u, v = operator_norm(op, method="dense", return_vectors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            # The other groups start anew.
            limit = {"max_iterations": 2} if op.geometry.groups == 1 else {}
            again = operator_norm(op, method=method, start=(u, v), **limit)
        torch.testing.assert_close(again, sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_nearby_saves_iterations(method: str) -> None:
    weight = torch.randn(8, 8, 3, 3, dtype=torch.float64)
    op = ConvOperator(weight, (10, 10), padding=1)
    _, u, v = operator_norm(op, return_vectors=True)
    moved = ConvOperator(weight + 1e-3 * torch.randn_like(weight), (10, 10), padding=1)
    truth = operator_norm(moved, method="dense")

    def short_of(start: tuple[torch.Tensor, torch.Tensor] | None) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return float(1 - operator_norm(moved, method=method, start=start, max_iterations=3, tol=1e-12) / truth)

    assert short_of((u, v)) < 1e-5
    assert short_of(None) > 1e-3


@pytest.mark.parametrize("method", ["lanczos", "block"])
def test_a_start_orthogonal_to_the_top_vector_does_no_harm(method: str) -> None:
    for op in operators():
        sigma, u, v = operator_norm(op, method="dense", return_vectors=True)
        orthogonal = torch.randn_like(v)
        orthogonal -= (orthogonal * v).sum() * v
        for start in ((u, orthogonal), (torch.zeros_like(u), torch.zeros_like(v)), (u * 1e-30, v * 1e30), (-u, -v)):
            # Two of these values are 4e-5 apart, which tol=1e-5 need not tell.
            found = operator_norm(op, method=method, start=start, tol=1e-7)
            torch.testing.assert_close(found, sigma, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["lanczos", "block"])
def test_another_singular_vector_does_no_harm(method: str) -> None:
    op = MatrixOperator(torch.diag(torch.linspace(0.5, 1.5, 60, dtype=torch.float64)))
    second = torch.zeros(60, dtype=torch.float64)
    second[58] = 1
    sigma = operator_norm(op, method=method, start=(second, second))
    torch.testing.assert_close(sigma, torch.tensor(1.5, dtype=torch.float64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", ["lanczos", "block"])
def test_a_new_top_group(method: str) -> None:
    """The vectors of an earlier call are zero outside the group that was the top."""
    weight = torch.randn(6, 2, 3, 3, dtype=torch.float64)
    weight[:2] *= 10
    _, u, v = operator_norm(ConvOperator(weight, (6, 6), padding=1, groups=3), return_vectors=True)
    weight[:2] /= 100
    op = ConvOperator(weight, (6, 6), padding=1, groups=3)
    sigma, new_u, _ = operator_norm(op, method=method, start=(u, v), return_vectors=True)
    torch.testing.assert_close(sigma, operator_norm(op, method="dense"), rtol=1e-5, atol=0)
    assert not new_u[:2].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes_of_the_start_and_the_weight_may_differ(dtype: torch.dtype) -> None:
    for weight_dtype in (torch.bfloat16, torch.float32, torch.float64):
        op = MatrixOperator(torch.randn(9, 7).to(weight_dtype))
        sigma, u, v = operator_norm(op, return_vectors=True)
        again = operator_norm(op, start=(u.to(dtype), v.to(dtype)))
        assert again.dtype == sigma.dtype
        torch.testing.assert_close(again, sigma, rtol=1e-5, atol=0)


def test_vectors_of_the_reduction_fit_too() -> None:
    op = ConvOperator(torch.randn(4, 3, 3, dtype=torch.float64), 40, stride=4, padding=1)
    small = op.reduced()
    assert small.in_shape != op.in_shape
    sigma, u, v = operator_norm(small, tol=1e-8, return_vectors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        again, u, v = operator_norm(op, start=(u, v), max_iterations=2, return_vectors=True)
    torch.testing.assert_close(again, sigma, rtol=1e-9, atol=0)
    assert (u.shape, v.shape) == (op.out_shape, op.in_shape)


def test_wrong_shapes() -> None:
    op = ConvOperator(torch.randn(4, 3, 3, 3), (9, 8), padding=1)
    u, v = torch.randn(op.out_shape), torch.randn(op.in_shape)
    for start in ((v, u), (u, v[:, :4]), (u[None], v[None]), (u.flatten(), v.flatten())):
        with pytest.raises(ValueError, match=r"start has shapes .*, expected u \(4, 9, 8\) and v \(3, 9, 8\)"):
            operator_norm(op, start=start)


def test_one_column() -> None:
    """A space of one dimension has no room for a random start beside the warm one."""
    for shape in ((5, 1), (1, 5), (1, 1)):
        op = MatrixOperator(torch.randn(shape, dtype=torch.float64))
        for method in METHODS:
            sigma, u, v = operator_norm(op, method=method, return_vectors=True)
            torch.testing.assert_close(operator_norm(op, method=method, start=(u, v)), sigma)
            torch.testing.assert_close(sigma, op.weight.norm())
