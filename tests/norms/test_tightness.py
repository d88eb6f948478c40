"""How far above the truth the bounds are: where a certificate is useless, it is no certificate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from sn_fast import ConvOperator, MatrixOperator, operator_norm_bound

from ..layers.geometries import Case, cases
from .test_bounds import as_if_large
from .truth import dense_norm, signs


def supremum_below(weight: torch.Tensor, stride: int, points: int = 512) -> float:
    """The norm on the unbounded lattice, from below: the symbol on a fine grid, by FFT of the polyphase kernel."""
    size = [-(-k // stride) * stride for k in weight.shape[2:]]
    padded = torch.zeros(*weight.shape[:2], *size, dtype=torch.float64)
    padded[:, :, : weight.shape[2], : weight.shape[3]] = weight
    phases = [padded[:, :, i::stride, j::stride] for i in range(stride) for j in range(stride)]
    symbol = torch.fft.fft2(torch.cat(phases, dim=1), s=(points, points)).permute(2, 3, 0, 1)
    return float(torch.linalg.matrix_norm(symbol, 2).max())


def kernel_of(kind: str, *shape: int) -> torch.Tensor:
    weight = torch.randn(shape, dtype=torch.float64)
    return {"gaussian": weight, "peak at zero": weight.abs(), "peak at pi": weight.abs() * signs(weight, 2)}[kind]


@pytest.mark.parametrize("kind", ["gaussian", "peak at zero", "peak at pi"])
@pytest.mark.parametrize(("k", "stride"), [(3, 1), (3, 2), (5, 2)])
def test_fft_is_close_to_the_supremum(k: int, stride: int, kind: str) -> None:
    weight = kernel_of(kind, 3, 2, k, k)
    below = supremum_below(weight, stride)
    op = ConvOperator(weight, (32, 32), stride=stride, padding=k // 2)
    for tightness in (1.01, 1.04):
        value = float(operator_norm_bound(op, method="fft", tightness=tightness))
        assert below <= value <= below * (tightness + 1e-3)
    coarse = float(operator_norm_bound(op, method="fft", grid=-(-k // stride)))
    assert below <= coarse
    assert float(operator_norm_bound(op, method="fft", grid=64)) <= below * 1.01


@pytest.mark.parametrize("kind", ["gaussian", "peak at zero", "peak at pi"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [4, 7, 16])
def test_circulant_is_below_fft_and_close_at_usual_sizes(size: int, stride: int, kind: str) -> None:
    op = ConvOperator(kernel_of(kind, 3, 2, 3, 3), (size, size), stride=stride, padding=1)
    circulant = float(operator_norm_bound(op, method="circulant"))
    assert circulant <= float(operator_norm_bound(op, method="fft")) * (1 + 1e-9)
    assert circulant <= dense_norm(op) * (1.2 if size < 16 else 1.03)


@settings(max_examples=60)
@given(cases())
def test_circulant_is_never_above_fft(case: Case) -> None:
    op = case.operator()
    fft = float(operator_norm_bound(op, method="fft"))
    assert float(operator_norm_bound(op, method="circulant")) <= fft * (1 + 2e-4)


@settings(max_examples=60)
@given(cases())
def test_auto_is_never_looser_than_fft(case: Case) -> None:
    op = case.operator()
    fft = float(operator_norm_bound(op, method="fft"))
    assert float(operator_norm_bound(op)) <= fft * (1 + 2e-6)
    with as_if_large():
        assert float(operator_norm_bound(op)) <= fft * (1 + 2e-4)


@settings(max_examples=60)
@given(cases())
def test_dense_is_within_a_hundred_thousandth(case: Case) -> None:
    op = case.operator()
    # A layer that reads nothing but padding has norm zero, but the rounding of its weight's size.
    rounding = 1e-6 * float(op.weight.norm())
    assert float(operator_norm_bound(op, method="dense")) <= dense_norm(op) * (1 + 1e-5) + rounding


def test_dense_is_close_for_a_matrix_too_large_for_eigenvalues() -> None:
    op = MatrixOperator(torch.randn(1100, 1100, dtype=torch.float64))
    assert float(operator_norm_bound(op, method="dense")) <= dense_norm(op) * (1 + 1e-4)


@pytest.mark.parametrize(
    ("stride", "dilation", "size"), [(1, 1, 6), (2, 1, 8), (3, 1, 9), (1, 3, 7), (2, 2, 8), (4, 6, 8)]
)
def test_circulant_is_exact_for_periodic_layers(stride: int, dilation: int, size: int) -> None:
    weight = torch.randn(3, 2, 3, dtype=torch.float64)
    # As many outputs as a full turn of strides.
    total = dilation * 2 + 1 - stride
    before = min(max(total, 0) // 2, size)
    after = min(max(total, 0) - before, size)
    op = ConvOperator(
        weight, size, stride=stride, dilation=dilation, padding=((before, after),), padding_mode="circular"
    )
    assert op.geometry.axes[0].out * stride == size
    truth = dense_norm(op)
    assert truth <= float(operator_norm_bound(op, method="circulant")) <= truth * (1 + 1e-3)


def test_circulant_is_exact_for_one_window_and_for_separate_windows() -> None:
    for op in (
        ConvOperator(torch.randn(3, 2, 4, 4), (4, 4)),
        ConvOperator(torch.randn(3, 2, 4, 4), (2, 2), padding=1),
        ConvOperator(torch.randn(3, 2, 2, 2), (8, 8), stride=2),
        ConvOperator(torch.randn(3, 2, 2, 3), (8, 8), stride=(2, 3), padding_mode="circular"),
    ):
        truth = dense_norm(op)
        assert truth <= float(operator_norm_bound(op, method="circulant")) <= truth * (1 + 1e-3)


def test_antiperiodic_circle_is_exact_for_equal_taps() -> None:
    """1 + 2 cos(pi / (H + 1)), where the periodic circle and the supremum both say 3."""
    for size in (2, 5, 9):
        op = ConvOperator(torch.ones(1, 1, 3, dtype=torch.float64), size, padding=1)
        truth = 1 + 2 * torch.cos(torch.tensor(torch.pi / (size + 1), dtype=torch.float64))
        assert dense_norm(op) == pytest.approx(float(truth))
        assert float(truth) <= float(operator_norm_bound(op, method="circulant")) <= float(truth) * (1 + 2e-4)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_cost_their_norm_and_no_more(mode: str) -> None:
    """All windows' copies at one place: the norm of the padding is attained by a kernel that adds them up."""
    op = ConvOperator(torch.ones(1, 1, 3, dtype=torch.float64), 2, padding=1, padding_mode=mode)
    truth = dense_norm(op)
    assert truth <= float(operator_norm_bound(op, method="circulant")) <= truth * 1.5


def test_rowsum_is_loose_but_not_absurd() -> None:
    op = ConvOperator(torch.randn(8, 8, 3, 3, dtype=torch.float64), (12, 12), padding=1)
    truth = dense_norm(op)
    assert float(operator_norm_bound(op, method="rowsum")) <= truth * 6
