"""The proof that no eigenvalue exceeds a limit: it accepts what holds, and refuses what is a trifle too small."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sn_fast.norms.definite import eigenvalue_bound


def matrices(count: int, n: int, dtype: torch.dtype) -> Tensor:
    a = torch.randn(count, n, n + 2, dtype=dtype)
    return a @ a.mH


def largest(grams: Tensor) -> float:
    return float(torch.linalg.eigvalsh(grams).max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("find_eigenvalues", [True, False])
def test_a_first_guess_that_is_too_small_is_refused(n: int, dtype: torch.dtype, find_eigenvalues: bool) -> None:
    for count in (1, 30):
        grams = matrices(count, n, dtype)
        truth = largest(grams)
        for short in (0.0, 0.5, 1e-2, 1e-4, 1e-7, 1e-9, 1e-12, -1e-9):
            guess = truth * (1 - short) if short else 0.0
            value = eigenvalue_bound(grams.split(7), start=guess, slack=1e-13, find_eigenvalues=find_eigenvalues)
            assert value >= truth * (1 - 1e-14)
        for slack in (1e-6, 2e-4):
            value = eigenvalue_bound(grams.split(7), slack=slack)
            assert truth * (1 - 1e-14) <= value <= truth * (1 + slack) ** 2
    grams = matrices(30, n, dtype)
    exact = largest(grams) * (1 + 1e-10)
    assert eigenvalue_bound(grams.split(7), start=exact, slack=0.0) <= exact * (1 + 1e-9)  # a right guess is kept


def test_the_rounding_of_the_proof_is_added() -> None:
    """limit (1 + 4 (n + 2) n u), where the factorisation itself cannot tell."""
    grams = torch.eye(50, dtype=torch.float64)[None]
    value = eigenvalue_bound([grams], start=1.0, slack=1e-13)
    assert value >= (1 + 1e-13) * (1 + 4 * 52 * 50 * 2.0**-53) * (1 - 2**-52)


def test_the_largest_of_many_counts_wherever_it_is() -> None:
    grams = matrices(50, 3, torch.float64)
    for i in (0, 7, 23, 49):
        peaked = grams.clone()
        peaked[i] *= 1000
        assert eigenvalue_bound(peaked.split(6)) >= largest(peaked)


def test_zero_matrices_and_giving_up() -> None:
    assert eigenvalue_bound([torch.zeros(3, 4, 4, dtype=torch.float64)]) == 0
    grams = matrices(20, 4, torch.float64)
    truth = largest(grams)
    assert eigenvalue_bound(grams.split(3), give_up=truth / 100) == math.inf
    assert truth <= eigenvalue_bound(grams.split(3), give_up=truth * 1.001) < math.inf
    some = torch.cat([torch.zeros(5, 4, 4, dtype=torch.float64), grams])
    assert eigenvalue_bound(some.split(2)) >= truth


def test_the_matrices_are_left_as_they_are() -> None:
    grams = matrices(9, 5, torch.complex128)
    before = grams.clone()
    eigenvalue_bound([grams])
    assert torch.equal(grams, before)
