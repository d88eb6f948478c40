"""Pooling and resampling against the dense matrix, or sampled Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from .truth import bound_of, jacobian_norm, report_of

SIZES = st.integers(3, 9)


def steepest_max_pool(f: Callable[[Tensor], Tensor], size: tuple[int, ...]) -> float:
    """The largest Jacobian: an input that is large at one position wins every window that contains it."""
    best = 0.0
    for i in range(math.prod(size)):
        x = torch.randn(math.prod(size), dtype=torch.float64)
        x[i] = 10.0
        best = max(best, jacobian_norm(f, x.reshape(1, 1, *size)))
    return best


@st.composite
def windows(draw: Any, n: int, dilated: bool) -> dict[str, Any]:
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(n))
    keywords: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": tuple(draw(st.integers(1, 3)) for _ in range(n)),
        "padding": tuple(draw(st.integers(0, k // 2)) for k in kernel),
        "ceil_mode": draw(st.booleans()),
    }
    if dilated:
        keywords["dilation"] = tuple(draw(st.integers(1, 2)) for _ in range(n))
    return keywords


@settings(max_examples=40)
@given(windows(2, dilated=True), st.tuples(SIZES, SIZES))
def test_max_pool_attains_its_constant(keywords: dict[str, Any], size: tuple[int, int]) -> None:
    extents = [d * (k - 1) + 1 for k, d in zip(keywords["kernel_size"], keywords["dilation"])]
    assume(all(s + 2 * p >= e for s, p, e in zip(size, keywords["padding"], extents)))
    module = nn.MaxPool2d(**keywords)
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    truth = steepest_max_pool(module, size)
    assert bound_of(module, x) == pytest.approx(truth)
    assert bound_of(lambda x: F.max_pool2d(x, **keywords), x) == bound_of(module, x)


def test_max_pool_of_padding_mostly() -> None:
    # One input, in both windows: positions -2..1 and -1..2.
    assert bound_of(nn.MaxPool1d(4, 1, 2), torch.randn(1, 1, 1)) == pytest.approx(math.sqrt(2))


@given(windows(1, dilated=False), SIZES, st.booleans())
def test_avg_pool_1d(keywords: dict[str, Any], size: int, include: bool) -> None:
    check_linear(nn.AvgPool1d(**keywords, count_include_pad=include), (size,))


@given(windows(2, dilated=False), st.tuples(SIZES, SIZES), st.booleans(), st.sampled_from([None, 3]))
def test_avg_pool_2d(keywords: dict[str, Any], size: tuple[int, int], include: bool, divisor: int | None) -> None:
    keywords |= {"count_include_pad": include, "divisor_override": divisor}
    check_linear(nn.AvgPool2d(**keywords), size)
    check_linear(lambda x: F.avg_pool2d(x, **keywords), size)


def test_avg_pool_3d() -> None:
    check_linear(nn.AvgPool3d((2, 3, 2), stride=(1, 2, 1), padding=(1, 1, 0)), (4, 5, 3))


def check_linear(f: Callable[[Tensor], Tensor], size: tuple[int, ...], tight: bool = True) -> None:
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    truth = jacobian_norm(f, x)
    bound = bound_of(f, x)
    assert bound >= truth * (1 - 1e-13)
    assert bound == pytest.approx(truth, rel=1e-9) or not tight


@settings(max_examples=30)
@given(st.tuples(SIZES, SIZES), st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_adaptive_pools(size: tuple[int, int], out: tuple[int, int]) -> None:
    check_linear(nn.AdaptiveAvgPool2d(out), size)
    check_linear(lambda x: F.adaptive_avg_pool2d(x, out), size)
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    truth = steepest_max_pool(nn.AdaptiveMaxPool2d(out), size)
    assert bound_of(nn.AdaptiveMaxPool2d(out), x) == pytest.approx(truth)
    assert bound_of(lambda x: F.adaptive_max_pool2d(x, out), x) == pytest.approx(truth)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_number_of_axes(n: int) -> None:
    x = torch.randn(1, 2, *(5, 4, 6)[:n])
    adaptive, maximum = getattr(nn, f"AdaptiveMaxPool{n}d")(2), getattr(nn, f"MaxPool{n}d")(2, 1)
    assert bound_of(maximum, x) == pytest.approx(2 ** (n / 2))
    assert bound_of(lambda x: getattr(F, f"max_pool{n}d")(x, 2, 1), x) == pytest.approx(2 ** (n / 2))
    assert bound_of(adaptive, x) == bound_of(lambda x: getattr(F, f"adaptive_max_pool{n}d")(x, 2), x)
    average = getattr(nn, f"AdaptiveAvgPool{n}d")(1)
    assert bound_of(average, x) == pytest.approx(1 / math.sqrt(x[0, 0].numel()))
    assert bound_of(lambda x: getattr(F, f"adaptive_avg_pool{n}d")(x, 1), x) == bound_of(average, x)


def test_max_pool_with_indices() -> None:
    x = torch.randn(1, 1, 6, 6)
    assert bound_of(lambda x: F.max_pool2d(x, 2, return_indices=True)[0], x) == 1.0
    report = report_of(lambda x: F.max_pool2d(x, 2, return_indices=True)[1], x)
    assert "integers" in report.reason
    assert "integers" in report_of(lambda x: F.max_pool2d(x, 2, return_indices=True), x).reason


@pytest.mark.parametrize("pool", [nn.LPPool2d(2, 2), nn.FractionalMaxPool2d(2, output_size=2)], ids=str)
def test_pools_without_a_bound(pool: nn.Module) -> None:
    assert "no bound is known" in report_of(pool, torch.randn(1, 1, 6, 6)).reason


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
@given(size=st.tuples(SIZES, SIZES), out=st.tuples(st.integers(1, 12), st.integers(1, 12)), data=st.data())
def test_interpolation_to_a_size(mode: str, size: tuple[int, int], out: tuple[int, int], data: Any) -> None:
    keywords: dict[str, Any] = {"mode": mode}
    if mode in ("bilinear", "bicubic"):
        keywords["align_corners"] = data.draw(st.booleans())
        keywords["antialias"] = not keywords["align_corners"] and data.draw(st.booleans())
    check_linear(lambda x: F.interpolate(x, out, **keywords), size)


@given(st.tuples(SIZES, SIZES), st.tuples(st.floats(0.5, 3), st.floats(0.5, 3)), st.booleans(), st.booleans())
def test_interpolation_by_a_factor(
    size: tuple[int, int], factor: tuple[float, float], recompute: bool, nearest: bool
) -> None:
    keywords: dict[str, Any] = {"mode": "nearest"} if nearest else {"mode": "bilinear", "align_corners": False}
    check_linear(nn.Upsample(scale_factor=factor, recompute_scale_factor=recompute, **keywords), size)


def test_other_resampling_layers() -> None:
    check_linear(nn.Upsample(scale_factor=2, mode="linear"), (5,))
    check_linear(nn.Upsample(scale_factor=2, mode="trilinear"), (3, 4, 2))
    check_linear(nn.UpsamplingNearest2d(scale_factor=3), (3, 4))
    check_linear(nn.UpsamplingBilinear2d(scale_factor=2), (3, 4))


def test_a_long_axis_has_a_bound_that_is_not_below_the_norm() -> None:
    size, factor = 3000, 2
    x = torch.randn(1, 1, size, dtype=torch.float64)
    bound = bound_of(lambda x: F.interpolate(x, scale_factor=factor, mode="linear"), x)
    # A slow wave is doubled in length and not changed otherwise: its norm grows by sqrt(2).
    wave = torch.sin(torch.linspace(0, math.pi, size, dtype=torch.float64))[None, None]
    stretched = F.interpolate(wave, scale_factor=factor, mode="linear")
    assert float(stretched.norm() / wave.norm()) <= bound <= 1.5
    # Averages that count the zeros around: only the windows at the ends weigh less.
    pool = nn.AvgPool1d(3, 1, 1)
    assert float(pool(wave).norm() / wave.norm()) <= bound_of(pool, x) <= 1.01
    assert bound_of(nn.AvgPool1d(3, 1), x) == pytest.approx(1.0, abs=1e-3)
