"""Constants of pooling and of resampling. Both act on each axis on its own: the constant is a product over axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .rounding import loosened, mul_up, root
from .rules import Call, Constant, no_bound, rule

_SVD_LIMIT = 2048  # larger side of a matrix whose 2-norm is computed
_COLUMNS = 256  # of a larger matrix at a time


@rule("max_pool1d", "max_pool1d_with_indices", nn.MaxPool1d)
@rule("max_pool2d", "max_pool2d_with_indices", nn.MaxPool2d)
@rule("max_pool3d", "max_pool3d_with_indices", nn.MaxPool3d)
def _max_pool(call: Call) -> float:
    # |max x - max y|^2 <= sum of (x - y)^2 in the window, and an element counts once for each of its windows
    n = _axes(call)
    call.allows("ceil_mode")
    kernels = _per_axis(call.get("kernel_size"), n)
    strides = _per_axis(call.get("stride", None) or kernels, n)
    paddings = _per_axis(call.get("padding", 0), n)
    dilations = _per_axis(call.get("dilation", 1), n)
    sizes, outs = call.x.shape[-n:], _first(call.out).shape[-n:]
    return _product(
        root(_largest_count(size, [[o * s + t * d - p for t in range(k)] for o in range(out)]))
        for size, out, k, s, p, d in zip(sizes, outs, kernels, strides, paddings, dilations)
    )


@rule("adaptive_max_pool1d", "adaptive_max_pool1d_with_indices", nn.AdaptiveMaxPool1d)
@rule("adaptive_max_pool2d", "adaptive_max_pool2d_with_indices", nn.AdaptiveMaxPool2d)
@rule("adaptive_max_pool3d", "adaptive_max_pool3d_with_indices", nn.AdaptiveMaxPool3d)
def _adaptive_max_pool(call: Call) -> float:
    # as max pooling, with windows from floor(o n / m) to ceil((o + 1) n / m)
    n = _axes(call)
    call.allows("output_size")
    return _product(
        root(_largest_count(size, [list(range(o * size // out, -(-(o + 1) * size // out))) for o in range(out)]))
        for size, out in zip(call.x.shape[-n:], _first(call.out).shape[-n:])
    )


@rule("avg_pool1d", nn.AvgPool1d)
@rule("avg_pool2d", nn.AvgPool2d)
@rule("avg_pool3d", nn.AvgPool3d)
def _avg_pool(call: Call) -> float:
    n = _axes(call)
    kernels = _per_axis(call.get("kernel_size"), n)
    strides = _per_axis(call.get("stride", None) or kernels, n)
    paddings = _per_axis(call.get("padding", 0), n)
    ceil_mode, include = call.get("ceil_mode", False), call.get("count_include_pad", True)
    divisor = call.get("divisor_override", None)
    norms = (
        _avg_pool_norm(size, k, s, p, bool(ceil_mode), bool(include), divisor is not None)
        for size, k, s, p in zip(call.x.shape[-n:], kernels, strides, paddings)
    )
    return loosened(_product(norms) / (1 if divisor is None else abs(divisor)))


@functools.lru_cache(maxsize=256)
def _avg_pool_norm(size: int, k: int, s: int, p: int, ceil_mode: bool, include: bool, summed: bool) -> float:
    """Norm of averaging, or summing, over windows of one axis."""

    def apply(x: Tensor) -> Tensor:
        columns = x[:, None, :, None]
        divisor = 1 if summed else None
        return F.avg_pool2d(columns, (k, 1), (s, 1), (p, 0), ceil_mode, include, divisor)[:, 0, :, 0]

    return _axis_norm(apply, size)


@rule("adaptive_avg_pool1d", nn.AdaptiveAvgPool1d)
@rule("adaptive_avg_pool2d", nn.AdaptiveAvgPool2d)
@rule("adaptive_avg_pool3d", nn.AdaptiveAvgPool3d)
def _adaptive_avg_pool(call: Call) -> float:
    n = _axes(call)
    call.allows("output_size")
    return _product(_adaptive_norm(size, out) for size, out in zip(call.x.shape[-n:], call.out.shape[-n:]))


@functools.lru_cache(maxsize=256)
def _adaptive_norm(size: int, out: int) -> float:
    return _axis_norm(lambda x: F.adaptive_avg_pool1d(x[:, None], out)[:, 0], size)


@rule("interpolate", "upsample", nn.Upsample)
def _interpolate(call: Call) -> float | Constant:
    call.allows("size", "scale_factor", "align_corners", "recompute_scale_factor", "antialias")
    mode = call.get("mode", "nearest")
    x, out = call.x, call.out
    n = x.ndim - 2
    if mode == "area":
        return _product(_adaptive_norm(size, m) for size, m in zip(x.shape[2:], out.shape[2:]))
    if mode not in ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "bicubic"):
        return no_bound(f"no rule for interpolation with mode={mode!r}")
    factor = call.get("scale_factor", None)
    # PyTorch samples at steps of 1 / scale_factor, not of size / out, when it is given the factor.
    use_factor = factor is not None and not call.get("recompute_scale_factor", None)
    factors: Sequence[float | None] = _per_axis(factor, n) if use_factor else (None,) * n
    align, antialias = call.get("align_corners", None), bool(call.get("antialias", False))
    return _product(
        _interpolation_norm(size, m, scale, mode, align, antialias)
        for size, m, scale in zip(x.shape[2:], out.shape[2:], factors)
    )


@functools.lru_cache(maxsize=256)
def _interpolation_norm(
    size: int, out: int, scale: float | None, mode: str, align: bool | None, antialias: bool
) -> float:
    """Norm of resampling one axis."""
    along_one = {"bicubic": "bicubic", "nearest": "nearest", "nearest-exact": "nearest-exact"}.get(mode, "bilinear")

    def apply(x: Tensor) -> Tensor:
        # Along the last axis: with antialias PyTorch resamples a strided column wrongly.
        rows = x[:, None, None, :]
        target: dict[str, Any] = {"size": (1, out)} if scale is None else {"scale_factor": (1.0, scale)}
        return F.interpolate(rows, mode=along_one, align_corners=align, antialias=antialias, **target)[:, 0, 0]

    return _axis_norm(apply, size)


def _axis_norm(apply: Callable[[Tensor], Tensor], size: int) -> float:
    """2-norm of the linear map ``apply``, (b, size) -> (b, m); of a very large one sqrt(|A|_1 |A|_inf) >= |A|_2."""
    out = apply(torch.zeros(1, size, dtype=torch.float64)).shape[-1]
    if max(size, out) <= _SVD_LIMIT:
        matrix = apply(torch.eye(size, dtype=torch.float64))
        return loosened(float(torch.linalg.matrix_norm(matrix, 2)))
    column_sum, row_sums = 0.0, torch.zeros(out, dtype=torch.float64)
    for start in range(0, size, _COLUMNS):
        some = torch.arange(start, min(start + _COLUMNS, size))
        columns = apply(F.one_hot(some, size).double()).abs()
        column_sum = max(column_sum, float(columns.sum(dim=1).max()))
        row_sums += columns.sum(dim=0)
    return loosened(math.sqrt(column_sum * float(row_sums.max())))


def _largest_count(size: int, windows: list[list[int]]) -> int:
    """In how many windows the most used position is."""
    counts = [0] * size
    for window in windows:
        for position in window:
            if 0 <= position < size:
                counts[position] += 1
    return max(counts, default=0)


def _product(norms: Any) -> float:
    return functools.reduce(mul_up, norms, 1.0)


def _axes(call: Call) -> int:
    """Number of pooled axes, from the name: max_pool2d, AvgPool3d."""
    return int(next(c for c in call.kind if c.isdigit()))


def _per_axis(value: Any, n: int) -> tuple[Any, ...]:
    if isinstance(value, (tuple, list)):
        return tuple(value) if len(value) == n else tuple(value) * n
    return (value,) * n


def _first(value: Any) -> Tensor:
    """The result, without the indices that may come with it."""
    first: Tensor = value[0] if isinstance(value, tuple) else value
    return first
