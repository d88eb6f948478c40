"""Estimates and bounds of operators that are known by their products, against dense SVDs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sn_fast import (
    ConvOperator,
    LinearOperator,
    MatrixOperator,
    operator_norm,
    operator_norm_bound,
    operator_norm_interval,
    operator_of,
    singular_values,
)

from ..layers.geometries import Case, cases
from ..layers.test_operators import Batched, Matrix, compositions, random

METHODS = ("power", "lanczos", "block", "dense")
NEED_WEIGHT = ("fft", "circulant", "rowsum")


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix.double(), 2))


@settings(max_examples=50)
@given(compositions())
def test_everything_that_needs_products_alone(drawn: tuple[LinearOperator, Tensor]) -> None:
    op, matrix = drawn
    truth = norm(matrix)
    for method in METHODS:
        sigma, u, v = operator_norm(op, method=method, tol=1e-7, return_vectors=True, max_iterations=20000)
        assert float(sigma) == pytest.approx(truth, rel=1e-5, abs=1e-12)
        assert (u.shape, v.shape) == (op.out_shape, op.in_shape)
        torch.testing.assert_close(matrix @ v, sigma * u, rtol=0, atol=1e-2 * truth + 1e-12)
    k = min(matrix.shape)
    values = singular_values(op, k)
    torch.testing.assert_close(values, torch.linalg.svdvals(matrix), rtol=1e-6, atol=1e-6 * truth + 1e-12)
    lower, upper = operator_norm_interval(op)
    assert float(lower) <= truth * (1 + 1e-13) + 1e-300
    assert truth * (1 - 1e-12) <= float(upper) <= truth * 1.001 + 1e-12
    for method in ("dense", "lanczos", "auto"):
        assert truth * (1 - 1e-12) <= float(operator_norm_bound(op, method=method)) <= truth * 1.02 + 1e-12


@settings(max_examples=25)
@given(cases(max_size=6), st.sampled_from([2.0, -0.5, 1e-30, 1e30]))
def test_multiples_and_adjoints_of_layers_keep_every_method(case: Case, c: float) -> None:
    op = case.operator()
    truth = norm(op.to_dense()) * abs(c)
    for multiple in (c * op, (c * op).T, -(c * op.T)):
        for method in ("auto", "dense", "lanczos", *NEED_WEIGHT):
            bound, info = operator_norm_bound(multiple, method=method, return_info=True)
            assert float(bound) >= truth * (1 - 1e-13)
            assert info.certified
        lower, upper = operator_norm_interval(multiple)
        assert float(lower) <= truth * (1 + 1e-13)
        assert float(upper) >= truth * (1 - 1e-13)
        assert float(operator_norm(multiple)) == pytest.approx(truth, rel=1e-5)
        _, u, v = operator_norm(multiple, return_vectors=True)
        if not truth:
            continue
        torch.testing.assert_close(multiple.matvec(v) / truth, u, rtol=0, atol=1e-2)


@settings(max_examples=25)
@given(cases(max_size=5), cases(max_size=5), st.integers(0, 3))
def test_layers_composed(first: Case, second: Case, kind: int) -> None:
    a = first.operator()
    if kind == 0:
        op: LinearOperator = a.T @ a
        matrix = a.to_dense().T @ a.to_dense()
    elif kind == 1:
        op = a - ConvOperator(
            torch.roll(first.weight(), 1, 0),
            first.input_size,
            groups=first.groups,
            transposed=first.transposed,
            **first.options,
        )
        matrix = a.to_dense() + op.parts[1].to_dense()  # the second part is negated already
    elif kind == 2:
        n = a.to_dense().shape[0]
        flat = LinearOperator.from_function(lambda x: x.flatten(1), a.out_shape, dtype=torch.float64)
        w = random(4, n, 7)
        op, matrix = MatrixOperator(w) @ flat @ a, w @ a.to_dense()
    else:
        b = second.operator()
        blocks = [torch.eye(a.to_dense().shape[0], dtype=torch.float64)]
        to_b = torch.ones(b.to_dense().shape[1], len(blocks[0]), dtype=torch.float64)
        middle = LinearOperator.from_function(
            lambda x: (x.flatten(1) @ to_b.T).reshape(-1, *b.in_shape), a.out_shape, dtype=torch.float64
        )
        op, matrix = b @ middle @ a, b.to_dense() @ to_b @ a.to_dense()
    truth = norm(matrix)
    assert float(operator_norm(op)) == pytest.approx(truth, rel=1e-5, abs=1e-9)
    lower, upper, info = operator_norm_interval(op, return_info=True)
    assert float(lower) <= truth * (1 + 1e-12) + 1e-12
    assert truth * (1 - 1e-12) <= float(upper) <= truth * 1.001 + 1e-9
    assert info.certified == (kind < 2)  # a lambda is not known to be linear


@pytest.mark.parametrize("method", NEED_WEIGHT)
@pytest.mark.parametrize("op", [Matrix(random(3, 4)), MatrixOperator(random(3, 4)) @ MatrixOperator(random(4, 4))])
def test_methods_that_need_a_weight_refuse_others_by_name(method: str, op: LinearOperator) -> None:
    with pytest.raises(ValueError, match=f"method='{method}' needs the weight of a single layer, and (Matrix|Product)"):
        operator_norm_bound(op, method=method)


def test_a_subclass_that_overrides_the_products_is_not_its_weight() -> None:
    b, a = random(6, 5, 1), random(5, 6, 2)

    class Composed(MatrixOperator):  # holds A, is B A
        def matvec(self, x: Tensor) -> Tensor:
            return super().matvec(x) @ b.T

        def rmatvec(self, y: Tensor) -> Tensor:
            return super().rmatvec(y @ b)

    op = Composed(a)
    op.out_shape = (6,)
    truth = norm(b @ a)
    assert abs(truth / norm(a) - 1) > 0.1
    for method in METHODS:
        assert float(operator_norm(op, method=method)) == pytest.approx(truth, rel=1e-4)
    lower, upper, info = operator_norm_interval(op, return_info=True)
    assert float(lower) <= truth <= float(upper) <= 1.001 * truth
    assert not info.certified
    assert "of the linear map that the operator's products compute" in info.detail
    for method in ("dense", "lanczos", "auto"):
        assert truth <= float(operator_norm_bound(op, method=method)) <= 1.02 * truth
    with pytest.raises(ValueError, match="needs the weight"):
        operator_norm_bound(op, method="rowsum")
    for composed, factor in ((2 * op, 2), (op.T, 1), (op + op, 2)):
        assert float(operator_norm(composed)) == pytest.approx(factor * truth, rel=1e-4)


def test_products_replaced_on_the_instance() -> None:
    w = random(5, 5, 3)
    op = MatrixOperator(w)
    op.matvec = lambda x: 7 * x @ w.T  # type: ignore[method-assign]
    op.rmatvec = lambda y: 7 * y @ w  # type: ignore[method-assign]
    assert float(operator_norm(op)) == pytest.approx(7 * norm(w), rel=1e-5)
    assert float(operator_norm_bound(op)) >= 7 * norm(w)


@pytest.mark.parametrize("measure", [operator_norm, operator_norm_bound, operator_norm_interval, singular_values])
def test_products_that_do_not_fit_each_other(measure) -> None:
    class Wrong(Matrix):
        def rmatvec(self, y: Tensor) -> Tensor:
            return 2 * super().rmatvec(y)

    class Half(MatrixOperator):  # overrides one of two
        def matvec(self, x: Tensor) -> Tensor:
            return 3 * super().matvec(x)

    class Affine(Matrix):
        def matvec(self, x: Tensor) -> Tensor:
            return super().matvec(x) + 1

    class Shape(Matrix):
        def matvec(self, x: Tensor) -> Tensor:
            return super().matvec(x)[:-1]

    class Bare(LinearOperator):
        def __init__(self) -> None:
            pass

        matvec = rmatvec = lambda self, x: x

    w = random(4, 4)
    for op in (Wrong(w), Half(w), Wrong(w) @ Matrix(w), 2 * Wrong(w), Matrix(w) + Half(w)):
        with pytest.raises(ValueError, match=r"rmatvec is not the adjoint of matvec: <A x, y> = .* but <x, A\^T y> = "):
            measure(op)
    with pytest.raises(ValueError, match="matvec is not linear"):
        measure(Affine(w))
    with pytest.raises(ValueError, match=r"matvec returned a tensor of shape \(3,\), expected shape \(4,\)"):
        measure(Shape(w))
    with pytest.raises(TypeError, match="Bare has no in_shape, out_shape, dtype, device"):
        measure(Bare())
    with pytest.raises(ValueError, match="NaN or infinite"):
        measure(Matrix(w * torch.nan))
    with pytest.raises(ValueError, match="NaN or infinite"):
        measure(MatrixOperator(w * torch.nan) @ Matrix(w))
    with pytest.raises(TypeError, match="op is a Tensor"):
        measure(w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("cls", [Matrix, Batched, MatrixOperator])
def test_dtypes(dtype: torch.dtype, cls: type) -> None:
    a, b = random(9, 20, 1, dtype), random(7, 9, 2, dtype)
    truth = norm(b.double() @ a.double())
    op = cls(b) @ cls(a)
    loose = 50 * torch.finfo(dtype).eps if cls is not MatrixOperator else 1e-5
    sigma = operator_norm(op, tol=max(1e-5, loose))
    assert sigma.dtype == torch.promote_types(dtype, torch.float32)
    assert float(sigma) == pytest.approx(truth, rel=max(1e-4, loose))
    lower, upper = operator_norm_interval(op, tol=max(1e-5, loose))
    assert float(lower) <= truth <= float(upper)


@pytest.mark.parametrize("exponent", [-300, -140, 140, 300])
def test_sizes_far_from_one(exponent: int) -> None:
    w = random(5, 6, 4)
    truth = norm(w)
    for op in (Matrix(w * 2.0**exponent), 2.0**exponent * (MatrixOperator(w) @ MatrixOperator(torch.eye(6).double()))):
        for value in (
            operator_norm(op),
            operator_norm_bound(op, method="dense"),
            operator_norm_bound(op, method="lanczos"),
        ):
            assert float(value) * 2.0**-exponent == pytest.approx(truth, rel=1.5e-2)


def test_zero_operators() -> None:
    w = random(3, 4)
    for op in (0 * MatrixOperator(w), Matrix(w) - Matrix(w), MatrixOperator(w) - MatrixOperator(w), Matrix(0 * w)):
        for method in METHODS:
            assert float(operator_norm(op, method=method)) <= 1e-14
        lower, upper = operator_norm_interval(op)
        assert float(lower) <= float(upper) <= 1e-12
        assert float(operator_norm_bound(op, method="lanczos")) <= 1e-12


def test_large_compositions_are_bounded_by_their_parts() -> None:
    conv = nn.Conv2d(16, 16, 3, padding=1)
    op = operator_of(conv, (32, 32))
    double = op @ op
    bound, info = operator_norm_bound(double, return_info=True)
    assert (info.method, info.certified, info.confidence) == ("parts", True, 1.0)
    assert float(operator_norm(double, tol=1e-3)) <= float(bound) <= float(operator_norm_bound(op)) ** 2 * (1 + 1e-9)
    with pytest.raises(ValueError, match="method='dense' would need a matrix of 16384 x 16384"):
        operator_norm_bound(double, method="dense")
    likely, info = operator_norm_bound(double, method="lanczos", return_info=True)
    assert info.confidence < 1
    assert float(operator_norm(double, tol=1e-3)) <= float(likely) <= float(bound)


def test_large_functions_are_bounded_with_probability() -> None:
    pool = LinearOperator.from_function(lambda x: F.avg_pool2d(x, 3, 2, 1), (16, 64, 64))
    bound, info = operator_norm_bound(pool, return_info=True)
    assert info.method == "lanczos"
    assert info.confidence < 1
    assert not info.certified
    assert float(operator_norm(pool, tol=1e-4)) <= float(bound) <= 1.02 * float(operator_norm(pool, tol=1e-4))


def test_warm_starts_of_compositions() -> None:
    op = Matrix(random(30, 40, 1)) @ Matrix(random(40, 50, 2))
    _, u, v = operator_norm(op, return_vectors=True)
    assert float(operator_norm(op, start=(u, v), max_iterations=20)) == pytest.approx(norm(op.to_dense()), rel=1e-5)
    with pytest.raises(ValueError, match="start has shapes"):
        operator_norm(op, start=(v, u))
