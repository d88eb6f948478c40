"""On the host, numbers that are read save operations: the results keep every bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sn_fast import ConvOperator
from sn_fast.reference.eager import is_readable
from sn_fast.reference.geometry import Geometry
from sn_fast.reference.linear_map import rmatvec, weight_gradient
from sn_fast.reference.normalize import normalize_backward
from sn_fast.reference.power import normalized, power_step

from .test_writes import Passing

SCALES = (1.0, 1e-30, 1e30, 0.0, float("nan"), float("inf"))


def watched(function, *args):
    """The result where a dispatch mode forbids to read numbers."""
    with Passing():
        assert not is_readable(*[a for a in args if isinstance(a, Tensor)])
        return function(*args)


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    one, other = (x.reshape(-1).contiguous() for x in (one, other))
    assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", SCALES)
def test_unit_vectors(scale: float, dtype: torch.dtype) -> None:
    for shape in ((1, 7), (1, 3, 5), (1, 4, 9, 33), (1, 2, 3, 4, 5), (1, 4097)):
        x, fallback = scale * torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
        with torch.no_grad():
            for a, b in zip(normalized(x, fallback, 1), watched(normalized, x, fallback, 1), strict=True):
                assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_the_largest_and_smallest_numbers(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    for value in (info.max, info.max / 3, info.tiny, 3 * info.tiny, info.tiny / 8, info.smallest_normal / 1024):
        x = torch.zeros(1, 3, 4, dtype=dtype)
        x[0, 1, 2] = value
        unit, norm = normalized(x, torch.zeros_like(x), 1)
        assert norm.item() == x[0, 1, 2].item()
        torch.testing.assert_close(unit, (x != 0).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n_iterations", [1, 3])
def test_power_iteration_of_many(n_iterations: int, dtype: torch.dtype) -> None:
    """Operators advanced together have the bits that they have alone: also beside one that is zero, huge or grouped."""
    operators: list[tuple[Tensor, Geometry]] = [(torch.randn(5, 7), Geometry()), (torch.randn(9, 3), Geometry())]
    conv, other = conv_case()
    operators += [(other, conv), (torch.zeros(5, 7), Geometry()), (1e30 * torch.randn(5, 7), Geometry())]
    operators += [(torch.full((5, 7), torch.nan), Geometry()), (1e-20 * torch.randn(4, 4), Geometry())]
    grouped = torch.randn(4, 2, 3, 3)
    operators += [(grouped, ConvOperator(grouped, (5, 5), groups=2).geometry)]
    transposed = torch.randn(4, 2, 3, 3)
    geometry = ConvOperator(transposed, (5, 5), stride=2, transposed=True).geometry
    operators += [(transposed, geometry), (other.to(memory_format=torch.channels_last), conv)]
    weights = [w.to(dtype) for w, _ in operators]
    precise = torch.promote_types(dtype, torch.float32)
    us = [torch.randn(g.out_shape(w.shape), dtype=precise) for w, g in operators]
    vs = [torch.randn(g.in_shape(w.shape), dtype=precise) for w, g in operators]
    codes = [g.encode() for _, g in operators]
    together = power_step(weights, us, vs, [c for code in codes for c in code], n_iterations)
    for i, code in enumerate(codes):
        alone = power_step(weights[i : i + 1], us[i : i + 1], vs[i : i + 1], code, n_iterations)
        for ours, theirs in zip(together, alone, strict=True):
            assert_same_bits(ours[i], theirs[0])


@pytest.mark.parametrize("cap", [True, False])
@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 0.0, float("nan"), float("inf")])
def test_gradients(sigma: float, cap: bool) -> None:
    with torch.no_grad():
        for geometry, weight in ((Geometry(), torch.randn(5, 7)), conv_case()):
            u, v = torch.randn(geometry.out_shape(weight.shape)), torch.randn(geometry.in_shape(weight.shape))
            code, grad = geometry.encode(), torch.randn_like(weight)
            for g, w in ((grad, weight), (grad, grad.transpose(0, 1).contiguous().transpose(0, 1))):
                args = (g, w, torch.tensor(sigma), u, v, None, code, 1.0, cap)
                ours, plain = normalize_backward(*args), watched(normalize_backward, *args)
                torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


def conv_case() -> tuple[Geometry, Tensor]:
    weight = torch.randn(4, 3, 3, 3)
    return ConvOperator(weight, (6, 9), stride=2, padding=1).geometry, weight


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (2, 0, 2), (3, 2, 1)])
def test_adjoints(stride: int, padding: int, dilation: int, groups: int) -> None:
    weight, settings = torch.randn(4, 6 // groups, 3, 3), {"stride": stride, "padding": padding, "dilation": dilation}
    geometry = ConvOperator(weight, (12, 9), groups=groups, **settings).geometry
    y = torch.randn(2, *geometry.out_shape(weight.shape))
    with torch.no_grad():
        assert_same_bits(rmatvec(y, weight, geometry), watched(rmatvec, y, weight, geometry))
        x = torch.randn(2, *geometry.in_shape(weight.shape))
        slope = weight_gradient(y[0], x[0], weight.shape, geometry)
    inner = (rmatvec(y[:1], weight, geometry)[0] * x[0]).sum()
    torch.testing.assert_close((slope * weight).sum(), inner, rtol=1e-4, atol=1e-4)
