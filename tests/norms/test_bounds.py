"""No bound is below the dense SVD: random geometries, extreme ones, extreme weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sn_fast import ConvOperator, MatrixOperator, operator_norm_bound, operator_norm_interval
from sn_fast.norms import bound as bound_module

from ..layers.geometries import Case, cases
from .truth import CERTAIN, SVD, dense_norm, hard_operator, scaled, signs

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def violations(op: Any, methods: tuple[str, ...] = CERTAIN, truth: float | None = None) -> dict[str, float]:
    """The methods whose bound is below the truth, with the ratio."""
    truth = dense_norm(op) if truth is None else truth
    bounds = {m: float(operator_norm_bound(op, method=m)) for m in methods}
    return {m: b / truth for m, b in bounds.items() if not b >= truth * (1 - SVD)}


@contextmanager
def as_if_large(affordable: float = 0.0) -> Iterator[None]:
    """Within this, "auto" does not go straight to "dense", and ends there only if it is ``affordable``."""
    before = bound_module._QUICK, bound_module._AFFORDABLE
    bound_module._QUICK, bound_module._AFFORDABLE = 0.0, affordable
    try:
        yield
    finally:
        bound_module._QUICK, bound_module._AFFORDABLE = before


@st.composite
def wild_cases(draw: st.DrawFn) -> Case:
    """Few channels, but paddings, strides and dilations far beyond the input: all that has a dense matrix."""
    n = draw(st.sampled_from([1, 1, 2]))
    mode = draw(st.sampled_from(["zeros", "zeros", "circular", "circular", "reflect", "replicate"]))
    transposed = mode == "zeros" and draw(st.booleans())
    kernel, stride, dilation, size, pads, extra = [], [], [], [], [], []
    for _ in range(n):
        k, s, d = draw(st.integers(1, 6)), draw(st.integers(1, 8)), draw(st.integers(1, 8))
        h = draw(st.integers(1, 9 if n == 1 else 5))
        extent = d * (k - 1) + 1
        if transposed:
            e = draw(st.integers(0, max(s, d) - 1))
            most = (h - 1) * s + extent + e - 1
            before = draw(st.integers(0, most))
            pads.append((before, draw(st.integers(0, most - before))))
            extra.append(e)
        else:
            if mode in ("circular", "reflect"):
                # The kernel must fit the input with as much padding as the mode allows.
                least = -(-extent // 3) if mode == "circular" else -(-(extent + 2) // 3)
                h = max(h, least)
            room = {"reflect": h - 1, "circular": h}.get(mode, 12)
            need = max(0, extent - h)
            low = max(0, need - room)
            before = draw(st.integers(low, max(low, room)))
            low = max(0, need - before)
            pads.append((before, draw(st.integers(low, max(low, room)))))
        kernel.append(k)
        stride.append(s)
        dilation.append(d)
        size.append(h)
    options: dict[str, Any] = {"stride": tuple(stride), "dilation": tuple(dilation), "padding": tuple(pads)}
    options |= {"output_padding": tuple(extra)} if transposed else {"padding_mode": mode}
    cin, cout = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    return Case(tuple(kernel), tuple(size), cin, cout, 1, transposed, draw(st.integers(0, 2**31)), options)


@settings(max_examples=200)
@given(cases(), st.sampled_from(DTYPES))
def test_no_bound_is_below_the_dense_norm(case: Case, dtype: torch.dtype) -> None:
    op = hard_operator(case, dtype)
    truth = dense_norm(op)
    assert violations(op, ("auto", "dense", "circulant", "fft", "rowsum"), truth) == {}
    lower, upper = operator_norm_interval(op)
    assert float(lower) <= truth * (1 + SVD) <= float(upper) * (1 + 2 * SVD)


@settings(max_examples=150)
@given(wild_cases())
def test_no_bound_is_below_the_dense_norm_of_wild_geometries(case: Case) -> None:
    assert violations(hard_operator(case, torch.float64)) == {}


@pytest.mark.slow
@settings(max_examples=6_000)
@given(case=cases(), dtype=st.sampled_from(DTYPES))
def test_no_bound_is_below_the_dense_norm_often(case: Case, dtype: torch.dtype) -> None:
    op = hard_operator(case, dtype)
    truth = dense_norm(op)
    # "auto" is "dense" for these, so half of them are given to what it does with larger ones.
    assert violations(op, ("auto" if case.seed % 2 else "dense", "fft", "circulant"), truth) == {}
    if case.seed % 2 == 0:
        with as_if_large():
            assert violations(op, ("auto",), truth) == {}


@pytest.mark.slow
@settings(max_examples=5_000)
@given(wild_cases())
def test_no_bound_is_below_the_dense_norm_of_wild_geometries_often(case: Case) -> None:
    assert violations(hard_operator(case, torch.float64), ("fft", "circulant", "rowsum")) == {}


@settings(max_examples=60)
@given(case=cases())
def test_auto_holds_where_it_is_not_dense(case: Case) -> None:
    op = hard_operator(case, torch.float64)
    truth = dense_norm(op)
    for affordable in (0.0, math.inf):
        with as_if_large(affordable):
            assert violations(op, ("auto",), truth) == {}


GEOMETRIES: dict[str, dict[str, Any]] = {
    "one pixel": {"shape": (3, 2, 3, 3), "size": (1, 1), "padding": 1},
    "one pixel, circular": {"shape": (3, 2, 3, 3), "size": (1, 1), "padding": 1, "padding_mode": "circular"},
    "one pixel, replicate": {"shape": (3, 2, 3, 3), "size": (1, 1), "padding": 1, "padding_mode": "replicate"},
    "one window that wraps": {"shape": (2, 2, 5), "size": 3, "padding": 1, "stride": 3, "padding_mode": "circular"},
    "one window that just fits": {"shape": (2, 2, 4), "size": 4, "stride": 2, "padding_mode": "circular"},
    "every input read three times": {"shape": (2, 2, 9), "size": 3, "padding": 3, "padding_mode": "circular"},
    "kernel larger than input": {"shape": (2, 2, 7, 7), "size": (2, 3), "padding": 6},
    "padding larger than input": {"shape": (2, 2, 3), "size": 2, "padding": 9},
    "padding before only": {"shape": (2, 2, 4), "size": 5, "padding": ((5, 0),)},
    "padding after only": {"shape": (2, 2, 4), "size": 5, "padding": ((0, 5),)},
    "inputs left over": {"shape": (2, 3, 2), "size": 9, "stride": 4},
    "one row": {"shape": (3, 2, 3, 3), "size": (1, 7), "padding": 1},
    "one column": {"shape": (3, 2, 3, 3), "size": (7, 1), "padding": 1},
    "stride beyond the kernel": {"shape": (3, 2, 2, 2), "size": (9, 8), "stride": (3, 5), "padding": 1},
    "dilation beyond the input": {"shape": (2, 2, 3, 2), "size": (4, 4), "dilation": (7, 5), "padding": (7, 3)},
    "stride 6, dilation 4": {"shape": (2, 2, 5), "size": 21, "stride": 6, "dilation": 4, "padding": 4},
    "stride 4, dilation 6": {"shape": (2, 2, 5), "size": 31, "stride": 4, "dilation": 6, "padding": 6},
    "stride 2, dilation 2": {"shape": (2, 2, 3, 3), "size": (9, 8), "stride": 2, "dilation": 2, "padding": 2},
    "stride 2, dilation 3": {"shape": (2, 2, 4), "size": 17, "stride": 2, "dilation": 3, "padding": 5},
    "circular, stride 6, dilation 4": {
        **{"shape": (2, 2, 3), "size": 12, "stride": 6, "dilation": 4, "padding": 4, "padding_mode": "circular"}
    },
    "circular, stride does not divide": {
        **{"shape": (2, 2, 3, 3), "size": (7, 8), "stride": (2, 3), "padding": 1, "padding_mode": "circular"}
    },
    "reflect, twice": {"shape": (2, 2, 6), "size": 4, "padding": 3, "padding_mode": "reflect"},
    "replicate": {"shape": (2, 2, 4, 3), "size": (3, 4), "padding": (5, 2), "padding_mode": "replicate"},
    "depthwise": {"shape": (6, 1, 3, 3), "size": (5, 6), "padding": 1, "groups": 6},
    "grouped, more outputs": {"shape": (12, 1, 3), "size": 9, "padding": 1, "groups": 3},
    "3d": {"shape": (2, 2, 3, 2, 2), "size": (4, 3, 4), "stride": (2, 1, 1), "padding": 1},
    "transposed": {"shape": (2, 3, 4, 3), "size": (4, 3), "stride": 2, "padding": 1, "transposed": True},
    "transposed, gap": {
        **{"shape": (2, 3, 2), "size": 4, "stride": 4, "output_padding": 3, "transposed": True, "dilation": 2}
    },
}
WEIGHTS = ["random", "equal", "alternating", "rank one", "single tap", "one axis alternating"]


def weight_of(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    weight = torch.randn(shape, dtype=torch.float64)
    if kind == "equal":
        return torch.full_like(weight, 0.3)
    if kind == "alternating":
        return signs(weight, len(shape) - 2)
    if kind == "one axis alternating":
        return signs(weight, 1) * weight.abs()
    if kind == "rank one":
        return weight[:, :1, ..., :1] * weight[:1, :, ..., :1] * weight[:1, :1]
    if kind == "single tap":
        single = torch.zeros_like(weight)
        single.view(-1)[weight.numel() // 2] = -1.7
        return single
    return weight


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_extreme_geometries(name: str, kind: str) -> None:
    options = dict(GEOMETRIES[name])
    op = ConvOperator(weight_of(kind, options.pop("shape")), options.pop("size"), **options)
    assert violations(op) == {}


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_small_circles(size: int, mode: str) -> None:
    """Every kernel, stride and padding that fits, with the all-equal kernel whose peak is a sum of all taps."""
    room = {"reflect": size - 1, "circular": size}.get(mode, 3)
    for k, s, before, after in itertools.product((1, 2, 3, 5), (1, 2, 3), range(room + 1), (0, room // 2, room)):
        if size + before + after >= k:
            options: dict[str, Any] = {"stride": s, "padding": ((before, after),), "padding_mode": mode}
            assert violations(ConvOperator(torch.ones(1, 1, k), size, **options), ("circulant",)) == {}, (k, options)


@pytest.mark.parametrize("method", [*CERTAIN, "lanczos"])
@pytest.mark.parametrize("groups", [1, 3])
def test_extreme_scales(method: str, groups: int) -> None:
    """Powers of two are exact, so every scale must give the bound of scale 1, rounded up where it is denormal."""
    weight = torch.randint(-3, 4, (6, 6 // groups, 3), dtype=torch.float64)
    truth = dense_norm(ConvOperator(weight, 5, padding=1, groups=groups))
    for dtype, exponents in (
        (torch.float64, (-1074, -1060, -1000, -300, 300, 1015)),
        (torch.float32, (-149, -126, 100)),
    ):
        for exponent in exponents:
            tiny = (weight * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)).to(dtype)
            op = ConvOperator(tiny, 5, padding=1, groups=groups)
            value = float(operator_norm_bound(op, method=method, generator=torch.Generator().manual_seed(0)))
            assert scaled(value, -exponent) >= truth * (1 - SVD)
            if exponent > -1000:
                assert scaled(value, -exponent) <= truth * 3


@pytest.mark.parametrize("method", [*CERTAIN, "lanczos"])
@pytest.mark.parametrize("n", range(1, 8))
def test_denormal_results_are_rounded_up(method: str, n: int) -> None:
    """sqrt(n) units of the smallest denormal number is no float64 in general."""
    op = MatrixOperator(torch.full((1, n), 5e-324, dtype=torch.float64))
    value = float(operator_norm_bound(op, method=method))
    assert scaled(value, 1074) >= math.sqrt(n)
    lower, upper = operator_norm_interval(op)
    assert scaled(float(lower), 1074) <= math.sqrt(n) <= scaled(float(upper), 1074)


@pytest.mark.parametrize("method", [*CERTAIN, "lanczos"])
def test_the_norm_overflows_to_infinity(method: str) -> None:
    op = ConvOperator(torch.full((4, 4, 3), 1e308, dtype=torch.float64), 9, padding=1)
    assert float(operator_norm_bound(op, method=method)) == math.inf


@pytest.mark.parametrize("method", [*CERTAIN, "lanczos"])
def test_mixed_scales(method: str) -> None:
    """Groups and rows at both ends of float64's range."""
    weight = (
        torch.ones(4, 1, 3, dtype=torch.float64)
        * torch.tensor([1e-300, 1e300, 0.0, 5e-324], dtype=torch.float64)[:, None, None]
    )
    op = ConvOperator(weight, 7, padding=1, groups=4)
    truth = 1e300 * dense_norm(ConvOperator(torch.ones(1, 1, 3).double(), 7, padding=1))
    assert truth * (1 - SVD) <= float(operator_norm_bound(op, method=method)) <= 1.1 * truth
    row = MatrixOperator(torch.tensor([[1e-300, 1e300, 5e-324]], dtype=torch.float64))
    assert 1e300 <= float(operator_norm_bound(row, method=method)) <= 1.1e300


@pytest.mark.parametrize("method", [*CERTAIN, "lanczos"])
def test_zero_weights(method: str) -> None:
    assert float(operator_norm_bound(ConvOperator(torch.zeros(2, 2, 3, 3), (5, 5), padding=1), method=method)) == 0
    assert float(operator_norm_bound(MatrixOperator(torch.zeros(2, 3)), method=method)) == 0
    assert [float(x) for x in operator_norm_interval(MatrixOperator(torch.zeros(2, 3)))] == [0, 0]
    weight = torch.randn(6, 1, 3)
    weight[2:4] = 0
    assert violations(ConvOperator(weight, 5, padding=1, groups=3), (method,)) == {}


@pytest.mark.parametrize("method", ["dense", "circulant", "fft"])
def test_a_matrix(method: str) -> None:
    for shape in ((1, 1), (3, 8), (9, 2)):
        op = MatrixOperator(torch.randn(shape))
        truth = dense_norm(op)
        assert truth * (1 - SVD) <= float(operator_norm_bound(op, method=method)) <= truth * 1.001


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (4, 2, 1), (3, 2, 3), (5, 6, 4), (2, 4, 2)])
@pytest.mark.parametrize("kind", WEIGHTS)
def test_fft_holds_for_every_input_size_and_zero_padding(kernel: int, stride: int, dilation: int, kind: str) -> None:
    weight = weight_of(kind, (2, 2, kernel))
    bound: float | None = None
    for size, before, after in itertools.product((1, 2, 4, 7, 25), (0, 1, 2, 5), (0, 4)):
        if size + before + after > dilation * (kernel - 1):
            op = ConvOperator(weight, size, stride=stride, dilation=dilation, padding=((before, after),))
            value, info = operator_norm_bound(op, method="fft", return_info=True)
            assert info.every_size
            bound = bound or float(value)
            assert float(value) == bound  # it does not depend on the size
            assert dense_norm(op) <= bound


def test_fft_holds_for_every_input_size_in_two_dimensions() -> None:
    weight = torch.randn(2, 3, 3, 4)
    bound = float(operator_norm_bound(ConvOperator(weight, (9, 9), stride=(1, 2)), method="fft"))
    for height, width, padding in itertools.product((3, 6, 11), (4, 8, 11), (0, 1, (0, 3))):
        assert dense_norm(ConvOperator(weight, (height, width), stride=(1, 2), padding=padding)) <= bound


def test_circulant_holds_for_smaller_inputs() -> None:
    for kind in WEIGHTS:
        weight = weight_of(kind, (2, 2, 3))
        bound = float(operator_norm_bound(ConvOperator(weight, 9, padding=1), method="circulant"))
        assert all(dense_norm(ConvOperator(weight, size, padding=1)) <= bound for size in range(1, 10))
