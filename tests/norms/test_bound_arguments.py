"""What the certified functions return, refuse, and leave alone."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import numpy as np
import pytest
import torch

from sn_fast import BoundInfo, ConvOperator, MatrixOperator, operator_norm_bound, operator_norm_interval
from sn_fast.norms.bound import METHODS

from ..on_device import DEVICE
from .truth import dense_norm


def conv(**options: Any) -> ConvOperator:
    return ConvOperator(torch.randn(4, 3, 3, 3), (8, 8), **{"padding": 1, **options})


def small(**options: Any) -> ConvOperator:
    return ConvOperator(torch.randn(4, 3, 3), 9, **{"padding": 1, **options})


@pytest.mark.parametrize("method", METHODS)
def test_info(method: str) -> None:
    for mode in ("zeros", "circular", "reflect"):
        op = small(padding_mode=mode)
        value, info = operator_norm_bound(op, method=method, return_info=True)
        assert isinstance(info, BoundInfo)
        assert info.method == ("dense" if method == "auto" else method)
        assert info.every_size == (mode == "zeros" and method in ("fft", "rowsum"))
        assert info.confidence == (1 - 1e-6 if method == "lanczos" else 1)
        assert info.detail
        assert "\n" not in info.detail
        if mode == "reflect" and method in ("fft", "circulant", "rowsum"):
            assert f"norm of the padding {math.sqrt(2):.4f}" in info.detail
        plain = operator_norm_bound(op, method=method, generator=None)
        assert float(plain) == float(value) or method == "lanczos"


def test_info_of_a_matrix() -> None:
    _, info = operator_norm_bound(MatrixOperator(torch.randn(3, 4)), return_info=True)
    assert info == BoundInfo("dense", True, 1.0, info.detail)


def test_detail_names_the_grid() -> None:
    value, info = operator_norm_bound(conv(), method="fft", grid=(8, 10), return_info=True)
    factor = 1 / math.cos(math.pi / 8) / math.cos(math.pi / 10)
    assert info.detail == f"8x10 frequencies, Riesz factor {factor:.4f}"
    assert float(value) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_float64_scalar_without_a_graph(method: str, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 2, 3, dtype=dtype, requires_grad=True)
    op = ConvOperator(weight, 6, padding=1, groups=2)
    value = operator_norm_bound(op, method=method)
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value.device == weight.device
    assert not value.requires_grad
    assert weight.grad is None
    # The bound is that of the weight's very bits.
    exact = ConvOperator(weight.detach().double(), 6, padding=1, groups=2)
    if method != "lanczos":
        assert float(operator_norm_bound(exact, method=method)) == pytest.approx(float(value), rel=1e-4)
    assert float(value) >= dense_norm(exact)


def test_an_interval_is_two_float64_scalars_without_a_graph() -> None:
    op = ConvOperator(torch.randn(4, 2, 3, requires_grad=True), 6, padding=1)
    lower, upper, info = operator_norm_interval(op, return_info=True)
    for end in (lower, upper):
        assert end.shape == ()
        assert end.dtype == torch.float64
        assert not end.requires_grad
    assert info.method == "dense"
    assert len(operator_norm_interval(op)) == 2


@pytest.mark.parametrize("method", METHODS)
def test_global_random_numbers_and_inputs_are_left_alone(method: str) -> None:
    op = small()
    before = op.weight.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    operator_norm_bound(op, method=method)
    operator_norm_interval(op)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert torch.equal(op.weight, before)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lanczos"])
def test_equal_calls_give_equal_bounds_also_under_autocast_and_inference_mode(method: str) -> None:
    op = small(stride=2)
    value = float(operator_norm_bound(op, method=method))
    assert float(operator_norm_bound(op, method=method)) == value
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert float(operator_norm_bound(op, method=method)) == value
    with torch.inference_mode():
        assert float(operator_norm_bound(op, method=method)) == value


def test_intervals_under_autocast() -> None:
    op = conv(stride=2)
    plain = [float(end) for end in operator_norm_interval(op)]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert [float(end) for end in operator_norm_interval(op)] == plain


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """Counts of how often an input is read are no matter of the default dtype, in which 257 may not exist."""
    op = ConvOperator(torch.ones(1, 1, 1, dtype=torch.float64), 1, padding=300, padding_mode="replicate")
    long = small(padding_mode="replicate")
    expected = [float(operator_norm_bound(o, method=m)) for o in (op, long) for m in METHODS[:-2]]
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        got = [float(operator_norm_bound(o, method=m)) for o in (op, long) for m in METHODS[:-2]]
    finally:
        torch.set_default_dtype(before)
    assert got == pytest.approx(expected, rel=1e-9)
    assert min(got[: len(METHODS) - 2]) >= math.sqrt(601)


def test_weights_that_are_views() -> None:
    weight = torch.randn(4, 3, 3, 5)
    expected = operator_norm_bound(ConvOperator(weight, (8, 8), padding=1))
    for view in (
        weight.to(memory_format=torch.channels_last),
        weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack([weight, weight], -1)[..., 0],
    ):
        for method in ("auto", "fft", "circulant", "rowsum"):
            value = operator_norm_bound(ConvOperator(view, (8, 8), padding=1), method=method)
            assert float(value) >= float(expected) * (1 - 1e-5)
        assert float(operator_norm_bound(ConvOperator(view, (8, 8), padding=1))) == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "svd"}, r"method='svd' is unknown; choose one of 'auto', 'dense', 'circulant'"),
        ({"grid": 8}, r"grid=8 is an argument of method='fft', not of method='auto'"),
        ({"grid": 8, "method": "circulant"}, r"grid=8 is an argument of method='fft', not of method='circulant'"),
        ({"grid": 2, "method": "fft"}, r"grid=2 is too coarse on axis 0: .* spans 3 cells, give at least 3"),
        ({"grid": (3, 2), "method": "fft"}, r"grid=\(3, 2\) is too coarse on axis 1"),
        ({"grid": 0, "method": "fft"}, r"grid=0: give an int >= 1"),
        ({"grid": (3, 3, 3), "method": "fft"}, r"grid=\(3, 3, 3\): give an int >= 1, or 2 of them"),
        ({"grid": 3.5, "method": "fft"}, r"grid=3.5: give an int"),
        ({"tightness": 1.0}, r"tightness=1.0 must be a number > 1, e.g. 1.01"),
        ({"tightness": 0.5, "method": "fft"}, r"tightness=0.5"),
        ({"tightness": math.inf, "method": "fft"}, r"tightness=inf"),
        ({"tightness": math.nan, "method": "fft"}, r"tightness=nan"),
        ({"tightness": "1.1", "method": "fft"}, r"tightness='1.1'"),
        ({"delta": 0.0, "method": "lanczos"}, r"delta=0.0 must be a probability between 0 and 1"),
        ({"delta": 1.0, "method": "lanczos"}, r"delta=1.0"),
        ({"delta": math.nan, "method": "lanczos"}, r"delta=nan"),
    ],
)
def test_bad_arguments(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        operator_norm_bound(conv(), **options)


def test_the_coarsest_grid_allowed_is_accepted() -> None:
    op = conv()
    assert float(operator_norm_bound(op, method="fft", grid=3)) >= dense_norm(op)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 2, 3, dtype=dtype)
    weight[1, 1, 2] = value
    op = ConvOperator(weight, 5, padding=1)
    for method in METHODS:
        with pytest.raises(ValueError, match="weight has NaN or infinite elements"):
            operator_norm_bound(op, method=method)
    with pytest.raises(ValueError, match="weight has NaN or infinite elements"):
        operator_norm_interval(op)


def test_no_operator() -> None:
    for wrong in (torch.nn.Linear(3, 3), torch.randn(3, 3), None):
        with pytest.raises(TypeError, match=rf"op is a {type(wrong).__name__}; give an operator: operator_of\(layer\)"):
            operator_norm_bound(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"operator_of\(layer\)"):
            operator_norm_interval(wrong)  # type: ignore[arg-type]


def test_too_large_for_dense() -> None:
    op = ConvOperator(torch.randn(64, 64, 3, 3), (64, 64), padding=1)
    with pytest.raises(
        ValueError, match=re.escape("method='dense' would factorise 1 matrices of 262144 x 262144; use")
    ):
        operator_norm_bound(op, method="dense")


@pytest.mark.parametrize("tol", [0, -1.0, math.nan, "1e-5"])
def test_bad_tolerances(tol: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"tol={tol!r}")):
        operator_norm_interval(conv(), tol=tol)
