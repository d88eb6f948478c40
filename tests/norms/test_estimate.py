"""operator_norm: every method against the dense SVD, its stopping rule, its extremes."""

from __future__ import annotations

import pytest
import torch

from sn_fast import ConvergenceWarning, ConvOperator, MatrixOperator, operator_norm

METHODS = ["power", "lanczos", "block", "dense"]


def gapped(m: int, n: int, spectrum: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A random matrix with this spectrum."""
    q = torch.linalg.qr(torch.randn(m, m, dtype=dtype)).Q[:, : len(spectrum)]
    r = torch.linalg.qr(torch.randn(n, n, dtype=dtype)).Q[:, : len(spectrum)]
    return q @ torch.diag(torch.tensor(spectrum, dtype=dtype)) @ r.T


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_method_finds_a_known_norm(method: str, dtype: torch.dtype) -> None:
    op = MatrixOperator(gapped(30, 20, [3.0, 2.5, 1.0, 0.5, 0.1], dtype))
    sigma, u, v = operator_norm(op, method=method, return_vectors=True)
    torch.testing.assert_close(sigma, torch.tensor(3.0, dtype=dtype), rtol=2e-6, atol=0)
    assert (op.rmatvec(u) - sigma * v).norm() <= 1e-5 * sigma


@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_strided_grouped_convolution(method: str) -> None:
    op = ConvOperator(torch.randn(6, 2, 3, 3, dtype=torch.float64), (8, 7), stride=2, padding=1, groups=3)
    truth = torch.linalg.matrix_norm(op.to_dense(), 2)
    sigma, u, v = operator_norm(op, method=method, return_vectors=True)
    torch.testing.assert_close(sigma, truth, rtol=1e-5, atol=0)
    torch.testing.assert_close((u * op.matvec(v)).sum(), sigma, rtol=1e-5, atol=0)
    # Only the group that attains the norm takes part.
    assert int((u.reshape(3, -1).norm(dim=1) > 0).sum()) == 1


def test_never_above_the_true_norm() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        op = ConvOperator(torch.randn(4, 3, 3, 3), (9, 9), stride=2)
        truth = torch.linalg.matrix_norm(op.to_dense().double(), 2)
        for method in ("power", "lanczos", "block"):
            with pytest.warns(ConvergenceWarning):
                sigma = operator_norm(op, method=method, max_iterations=3, tol=1e-12)
            assert sigma <= truth * (1 + 1e-6)


def test_lanczos_survives_restarts_on_a_crowded_spectrum() -> None:
    values = torch.linspace(1.0, 0.9, 150, dtype=torch.float64).tolist()
    sigma = operator_norm(MatrixOperator(gapped(200, 150, values)), max_iterations=2000)
    torch.testing.assert_close(sigma, torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)


def test_fifteen_lanczos_steps_are_close_and_one_power_step_is_not() -> None:
    """The reason for the Lanczos start."""
    op = ConvOperator(torch.randn(32, 32, 3, 3), (16, 16), padding=1)
    truth = operator_norm(op)
    with pytest.warns(ConvergenceWarning):
        lanczos = operator_norm(op, max_iterations=15, tol=1e-9)
    with pytest.warns(ConvergenceWarning):
        power = operator_norm(op, method="power", max_iterations=1)
    assert 1 - lanczos / truth < 0.01
    assert 1 - power / truth > 0.2


def test_a_restart_is_no_worse_than_before_it() -> None:
    op = MatrixOperator(torch.randn(300, 300, dtype=torch.float64))
    residuals = []
    for n in (30, 33, 40, 60):
        with pytest.warns(ConvergenceWarning):
            residuals.append(float(operator_norm(op, max_iterations=n, tol=1e-14)))
    assert residuals == sorted(residuals)


@pytest.mark.parametrize("method", ["power", "lanczos", "block"])
def test_not_converged_warns_how_far(method: str) -> None:
    op = MatrixOperator(gapped(20, 20, [1.0, 0.999, 0.99, 0.98, 0.97, 0.5]))
    with pytest.warns(
        ConvergenceWarning, match=r"stopped after 2 iterations with .* = \d\.\de-\d+ \* sigma, above tol"
    ):
        operator_norm(op, method=method, max_iterations=2, tol=1e-13)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-13, 1e13, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_scale_does_not_matter(method: str, scale: float) -> None:
    weight = torch.randn(5, 3, 3, 3)
    size = (6, 6)
    truth = operator_norm(ConvOperator(weight.double(), size, padding=1), method="dense")
    sigma = operator_norm(ConvOperator(weight * scale, size, padding=1), method=method)
    torch.testing.assert_close(sigma.double() / scale, truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_rank_one_and_tiny(method: str) -> None:
    assert operator_norm(MatrixOperator(torch.zeros(4, 3)), method=method) == 0
    torch.testing.assert_close(
        operator_norm(MatrixOperator(torch.ones(4, 3)), method=method), torch.tensor(12.0).sqrt()
    )
    torch.testing.assert_close(operator_norm(MatrixOperator(torch.tensor([[-2.0]])), method=method), torch.tensor(2.0))


def test_equal_calls_give_equal_results_and_leave_the_global_generator_alone() -> None:
    op = MatrixOperator(torch.randn(9, 7))
    state = torch.get_rng_state()
    assert torch.equal(operator_norm(op), operator_norm(op))
    assert torch.equal(torch.get_rng_state(), state)
    operator_norm(op, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "svd"}, "method='svd'"),
        ({"tol": 0.0}, "tol=0.0"),
        ({"tol": float("nan")}, "tol=nan"),
        ({"max_iterations": 0}, "max_iterations=0"),
    ],
)
def test_bad_arguments(options, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        operator_norm(MatrixOperator(torch.randn(3, 3)), **options)


def test_bad_weights_and_too_large_for_dense() -> None:
    with pytest.raises(ValueError, match="NaN"):
        operator_norm(MatrixOperator(torch.tensor([[float("nan")]])))
    with pytest.raises(ValueError, match="method='lanczos'"):
        operator_norm(ConvOperator(torch.randn(64, 64, 3, 3), (32, 32), padding=1), method="dense")
