"""Frobenius norms of operators against their dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sn_fast import ConvOperator, LinearOperator, MatrixOperator, operator_of
from sn_fast.norms.frobenius import frobenius_norm


def check(op: LinearOperator, rel: float = 1e-12) -> None:
    truth = float(torch.linalg.vector_norm(op.to_dense().detach().double()))
    value, upper = frobenius_norm(op)
    assert value == pytest.approx(truth, rel=rel)
    if upper is not None:
        assert truth * (1 - 1e-15) <= upper <= truth * (1 + 1e-10)


@settings(max_examples=60)
@given(
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    size=st.tuples(st.integers(4, 8), st.integers(4, 8)),
    groups=st.sampled_from([1, 2]),
    transposed=st.booleans(),
)
def test_convolutions(mode, kernel, stride, dilation, padding, size, groups, transposed):
    """The kernel's own norm, or one without the positions that padding takes away, is another number."""
    torch.manual_seed(0)
    shape = (4, 2, *kernel) if transposed else (4, 4 // groups, *kernel)
    pads = [(p, p) for p in padding]
    try:
        op = ConvOperator(
            torch.randn(shape, dtype=torch.float64),
            size,
            stride=stride,
            dilation=dilation,
            padding=pads,
            groups=groups,
            transposed=transposed,
            padding_mode="zeros" if transposed else mode,
        )
    except ValueError:
        return  # such a convolution does not exist
    check(op)


def test_asymmetric_padding_and_other_dimensions():
    weight = torch.randn(3, 2, 3, 2, dtype=torch.float64)
    check(ConvOperator(weight, (5, 6), stride=2, padding=[(0, 1), (1, 0)]))
    check(operator_of(nn.Conv1d(2, 3, 4, stride=2, padding=3, padding_mode="replicate").double(), (7,)))
    check(operator_of(nn.Conv3d(2, 3, 2, padding=1, padding_mode="circular").double(), (3, 4, 2)))


def test_a_kernel_counts_as_often_as_it_is_used():
    ones = torch.ones(1, 1, 3, 3, dtype=torch.float64)
    # Per axis of length 4 with one zero around it, the outer taps read 3 inputs and the middle one 4.
    assert frobenius_norm(ConvOperator(ones, (4, 4), padding=1)).value == pytest.approx(10.0)
    # With replicated borders two taps of an outer output read one input: entries 2, 1 in the outer rows.
    line = torch.ones(1, 1, 3, dtype=torch.float64)
    op = ConvOperator(line, (4,), padding=1, padding_mode="replicate")
    assert frobenius_norm(op).value == pytest.approx((2 * (4 + 1) + 2 * 3) ** 0.5)


def test_matrices_multiples_and_compositions():
    a, b = torch.randn(5, 7, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    check(MatrixOperator(a))
    check(-2.5 * MatrixOperator(a))
    assert frobenius_norm(MatrixOperator(b) @ MatrixOperator(a)).value == pytest.approx(float((b @ a).norm()))
    assert frobenius_norm(MatrixOperator(b) @ MatrixOperator(a)).upper is None
    check(LinearOperator.from_function(lambda x: x.cumsum(-1), (6,)), rel=1e-6)


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_squares_neither_vanish_nor_overflow(size):
    a = torch.randn(3, 3, dtype=torch.float64)
    value, upper = frobenius_norm(MatrixOperator(a * size))
    assert value == pytest.approx(float(a.norm()) * size, rel=1e-12)
    assert upper is not None
    assert upper >= value
    assert frobenius_norm(MatrixOperator(0 * a)) == (0.0, 0.0)


def test_what_has_no_norm_is_refused():
    with pytest.raises(ValueError, match="NaN or infinite"):
        frobenius_norm(MatrixOperator(torch.tensor([[float("nan")]])))
    with pytest.raises(ValueError, match="takes 40000 products"):
        frobenius_norm(LinearOperator.from_function(lambda x: 2 * x, (40000,)))
