"""The proof behind "fft": the largest value on a grid, over prod cos(pi (k' - 1) / (2 N)), bounds the supremum."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sn_fast import ConvOperator, operator_norm_bound
from sn_fast.norms.grid import every_size, riesz_sizes
from sn_fast.norms.symbol import Polyphase


def norms(coefficients: Tensor, points: tuple[int, ...], shift: float = 0.0) -> Tensor:
    """|P(theta)| of sum_j C_j exp(i <j, theta>), C (rows, columns, *cells), on a grid moved by ``shift`` spacings."""
    for i, n in enumerate(points):
        theta = 2 * math.pi * (torch.arange(n, dtype=torch.float64) + shift) / n
        waves = torch.exp(1j * torch.outer(theta, torch.arange(coefficients.shape[2 + i], dtype=torch.float64))).to(
            torch.complex128
        )
        coefficients = torch.tensordot(coefficients.to(torch.complex128), waves, dims=([2 + i], [1])).movedim(-1, 2 + i)
    return torch.linalg.matrix_norm(coefficients.movedim((0, 1), (-2, -1)), 2)


def factor(cells: tuple[int, ...], points: tuple[int, ...]) -> float:
    """What the package uses."""
    return every_size([Polyphase(1, c) for c in cells], points).factor


def test_the_factor_is_the_formula() -> None:
    assert factor((3,), (32,)) == pytest.approx(1 / math.cos(math.pi / 32))
    assert factor((3, 2, 1), (8, 5, 1)) == pytest.approx(1 / math.cos(math.pi / 8) / math.cos(math.pi / 10))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_inequality_on_random_matrix_polynomials(axes: int) -> None:
    generator = torch.Generator().manual_seed(axes)
    for trial in range(150 if axes < 3 else 40):
        cells = tuple(torch.randint(1, 6 if axes < 3 else 4, (axes,), generator=generator).tolist())
        points = tuple(c + int(torch.randint(0, 4, (1,), generator=generator)) for c in cells)
        parts = torch.randn(2, 2, 2, *cells, generator=generator, dtype=torch.float64)
        coefficients = torch.complex(parts[0], parts[1]) if trial % 2 else parts[0].abs()
        shift = float(torch.rand(1, generator=generator))
        fine = float(norms(coefficients, (128 if axes < 3 else 24,) * axes).max())
        assert fine <= float(norms(coefficients, points, shift).max()) * factor(cells, points) * (1 + 1e-12)


def extremal(cells: int) -> Tensor:
    """|p| = |cos((k' - 1) theta / 2)|."""
    c = torch.zeros(cells, dtype=torch.float64)
    c[0] = c[-1] = 0.5
    return c if cells > 1 else torch.ones(1, dtype=torch.float64)


@pytest.mark.parametrize("cells", [2, 3, 4, 5, 7])
@pytest.mark.parametrize("multiple", [2, 3, 5])
def test_an_extremal_polynomial_attains_it(cells: int, multiple: int) -> None:
    """A quarter of the polynomial's period off: its peaks lie midway between points, so no smaller factor holds."""
    points = multiple * (cells - 1)
    on_grid = float(norms(extremal(cells)[None, None], (points,), shift=0.5).max())
    assert on_grid * factor((cells,), (points,)) == pytest.approx(1, rel=1e-12)
    # And so a smaller factor is caught: k' - 1 by k' - 2, or a root of it.
    wrong = [1 / math.cos(math.pi * (cells - 2) / (2 * points)), factor((cells,), (points,)) ** 0.98, 1.0]
    assert all(on_grid * w < 1 - 1e-6 for w in wrong)


def test_an_extremal_polynomial_of_several_axes_attains_the_product() -> None:
    for cells in itertools.product((2, 3, 4), repeat=2):
        coefficients = torch.outer(extremal(cells[0]), extremal(cells[1]))[None, None]
        points = (2 * (cells[0] - 1), 3 * (cells[1] - 1))
        on_grid = float(norms(coefficients, points, shift=0.5).max())
        assert on_grid * factor(cells, points) == pytest.approx(1, rel=1e-12)
        one_axis_only = max(factor(cells[:1], points[:1]), factor(cells[1:], points[1:]))
        assert on_grid * one_axis_only < 0.95


@pytest.mark.parametrize(
    ("kernel", "stride", "grid"),
    [
        ((1.0, 0.0, -1.0), 1, 6),
        ((1.0, -1.0), 1, 3),
        ((1.0, 0.0, -1.0), 1, 10),
        ((1.0, 0.0, 0.0, 0.0, -1.0), 2, 6),
        ((1.0, 0.0, 0.0, 0.0, -1.0), 1, 12),
    ],
)
def test_the_bound_of_a_layer_with_an_extremal_symbol(kernel: tuple[float, ...], stride: int, grid: int) -> None:
    """1 - exp(2 i theta) peaks at pi / 2, midway between the points of such a grid: the whole factor is needed."""
    weight = torch.tensor(kernel, dtype=torch.float64)[None, None]
    op = ConvOperator(weight, 40, stride=stride, padding=4)
    value = float(operator_norm_bound(op, method="fft", grid=grid))
    assert value == pytest.approx(2, rel=3e-4)
    assert value >= 2


def test_the_bound_of_a_two_dimensional_layer_with_an_extremal_symbol() -> None:
    row = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    op = ConvOperator(torch.outer(row, row)[None, None], (40, 40), padding=1)
    value = float(operator_norm_bound(op, method="fft", grid=6))
    assert value == pytest.approx(4, rel=3e-4)
    assert value >= 4


@pytest.mark.parametrize("tightness", [1.0001, 1.01, 1.5, 100.0, 1e17, 1e300])
def test_default_grids_are_as_tight_as_wanted_and_fine_enough(tightness: float) -> None:
    """The lemma needs k' points. At absurd tightness rounding once made a grid of k' - 1, and a factor below zero."""
    for cells in [(1,), (2,), (3,), (48,), (98,), (1, 3), (3, 4), (2, 3, 5), (1, 1)]:
        axes = [Polyphase(1, c) for c in cells]
        sizes = riesz_sizes(axes, tightness)
        assert all(n >= c for n, c in zip(sizes, cells))
        assert 1 <= every_size(axes, sizes).factor <= tightness * (1 + 1e-9)
    op = ConvOperator(torch.randn(1, 1, 48), 60)
    assert operator_norm_bound(op, method="fft", tightness=tightness) >= operator_norm_bound(op) * (1 - 1e-5)
