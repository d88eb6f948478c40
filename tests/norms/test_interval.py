"""operator_norm_interval: it contains the dense SVD, and is narrow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sn_fast import (
    ConvOperator,
    MatrixOperator,
    operator_norm,
    operator_norm_bound,
    operator_norm_interval,
    operator_of,
)
from sn_fast.norms.interval import attained_norm

from .truth import SVD, dense_norm


def check(op, width: float) -> tuple[float, float]:
    lower, upper = (float(end) for end in operator_norm_interval(op))
    assert 0 < lower <= upper <= lower * (1 + width)
    return lower, upper


# The convolutions of a CIFAR-style ResNet-18 at 32 x 32: (channels in, out, kernel, stride, input size).
RESNET18 = [
    (3, 64, 3, 1, 32),
    (64, 64, 3, 1, 32),
    (64, 128, 3, 2, 32),
    (128, 128, 3, 1, 16),
    (64, 128, 1, 2, 32),
    (128, 256, 3, 2, 16),
    (256, 256, 3, 1, 8),
    (128, 256, 1, 2, 16),
    (256, 512, 3, 2, 8),
    (512, 512, 3, 1, 4),
    (256, 512, 1, 2, 8),
]
SMALL = {0, 4, 7, 10}


@pytest.mark.parametrize(
    "layer", [pytest.param(x, marks=[] if i in SMALL else pytest.mark.slow) for i, x in enumerate(RESNET18)]
)
def test_intervals_of_a_resnet_are_narrow(layer: tuple[int, int, int, int, int]) -> None:
    cin, cout, k, stride, size = layer
    conv = nn.Conv2d(cin, cout, k, stride, k // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    check(operator_of(conv, (size, size)), 0.05)


def test_a_linear_layer() -> None:
    op = operator_of(nn.Linear(512, 10))
    lower, upper = check(op, 1e-5)
    assert lower <= dense_norm(op) <= upper


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_it_contains_the_dense_norm(mode: str, dtype: torch.dtype) -> None:
    for stride, groups, transposed in [(1, 1, False), (2, 2, False), (3, 1, False), (2, 2, True)]:
        if transposed and mode != "zeros":
            continue
        weight = torch.randn(4, 2, 3, 3).to(dtype)
        op = ConvOperator(
            weight, (7, 6), stride=stride, padding=1, groups=groups, padding_mode=mode, transposed=transposed
        )
        lower, upper = check(op, 1e-4)
        assert lower <= dense_norm(op) * (1 + SVD)
        assert dense_norm(op) * (1 - SVD) <= upper


def test_the_lower_end_is_never_above_a_norm_known_in_closed_form() -> None:
    """Where |A v| is exact the rounding must still go down."""
    for n in range(1, 60):
        ones = MatrixOperator(torch.ones(n, n, dtype=torch.float64))
        assert float(operator_norm_interval(ones)[0]) <= n
        scaled = MatrixOperator(torch.full((1, n), 0.1, dtype=torch.float64))
        assert float(operator_norm_interval(scaled)[0]) ** 2 <= n * 0.1**2 * (1 + 1e-15)


def test_attained_norm_is_below_for_any_vector_and_close_for_the_top_one() -> None:
    op = ConvOperator(torch.randn(3, 2, 3, 3), (6, 6), padding=1)
    truth = dense_norm(op)
    for _ in range(20):
        v = torch.randn(op.in_shape) * 1e3
        image = torch.linalg.vector_norm(ConvOperator(op.weight.double(), (6, 6), padding=1).matvec(v.double()))
        assert attained_norm(op, v) == pytest.approx(float(image / v.double().norm()), rel=1e-12)
        assert attained_norm(op, v) <= truth
    _, _, v = operator_norm(op, return_vectors=True)
    assert attained_norm(op, v) == pytest.approx(truth, rel=1e-6)
    assert attained_norm(op, torch.zeros(op.in_shape)) == 0


def test_a_loose_tolerance_moves_the_lower_end_alone() -> None:
    op = ConvOperator(torch.randn(8, 8, 3, 3), (8, 8), padding=1)
    loose, tight = operator_norm_interval(op, tol=0.3), operator_norm_interval(op)
    truth = dense_norm(op)
    assert loose[0] < tight[0] <= truth <= min(loose[1], tight[1])
    assert max(loose[1], tight[1]) <= truth * (1 + 1e-5)


def test_auto_is_the_upper_end() -> None:
    op = ConvOperator(torch.randn(4, 4, 3, 3), (8, 8), padding=1)
    _, upper, info = operator_norm_interval(op, return_info=True)
    expected, expected_info = operator_norm_bound(op, return_info=True)
    assert float(upper) == float(expected)
    assert info == expected_info


def test_a_start_is_used_and_checked() -> None:
    op = ConvOperator(torch.randn(4, 3, 3, 3), (8, 8), padding=1)
    _, u, v = operator_norm(op, return_vectors=True)
    lower, upper = operator_norm_interval(op, start=(u, v))
    assert float(lower) <= dense_norm(op) <= float(upper) <= float(lower) * (1 + 1e-5)
    with pytest.raises(ValueError, match=r"start has shapes .*, expected u \(4, 8, 8\) and v \(3, 8, 8\)"):
        operator_norm_interval(op, start=(v, u))
