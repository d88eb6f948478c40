"""Sorting, order statistics and norms: never below a slope, and attained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .truth import bound_of, difference, largest_slope, numerical_norm, report_of

pytestmark = pytest.mark.usefixtures("rules_alone")
SHAPE = (3, 5)
ORDER: dict[str, Callable[[Tensor], Any]] = {
    "sort": lambda x: x.sort(2).values,
    "sort by name": lambda x: torch.sort(descending=True, dim=1, input=x)[0],
    "stable sort": lambda x: torch.sort(x, stable=True, dim=-1)[0],
    "msort": torch.msort,
    "topk": lambda x: x.topk(2, dim=1)[0],
    "smallest": lambda x: torch.topk(largest=False, k=3, input=x, dim=2).values,
    "kthvalue": lambda x: torch.kthvalue(x, 2, 1)[0],
    "kthvalue of the last": lambda x: x.kthvalue(4).values,
    "median": lambda x: x.median(1).values,
    "nanmedian": lambda x: torch.nanmedian(x, dim=2)[0],
    "max": lambda x: torch.max(dim=1, input=x)[0],
    "min": lambda x: x.min(2, keepdim=True).values,
    "amin": lambda x: torch.amin(dim=(1, 2), input=x),
}


@pytest.mark.parametrize("name", ORDER)
def test_order_statistics(name: str) -> None:
    f = ORDER[name]
    bound = bound_of(f, torch.zeros(1, *SHAPE, dtype=torch.float64))
    assert largest_slope(f, SHAPE) <= bound + 1e-9
    assert bound == 1.0
    assert largest_slope(f, SHAPE) == pytest.approx(1.0)


@pytest.mark.parametrize("f", [lambda x: torch.cummax(x, 2)[0], lambda x: torch.cummin(dim=2, input=-x).values])
def test_cumulative_extremes(f: Callable[[Tensor], Any]) -> None:
    assert bound_of(f, torch.randn(1, *SHAPE)) == pytest.approx(math.sqrt(5))
    assert largest_slope(f, SHAPE) <= math.sqrt(5) + 1e-9
    sign = 1 if "cummax" in repr(f.__code__.co_names) else -1
    first = torch.zeros(1, 1, 5, dtype=torch.float64)
    first[..., 0] = 9.0
    assert difference(lambda x: f(sign * x) * sign if sign < 0 else f(x), first, 1e-3) <= math.sqrt(5) + 1e-9


def test_smallest_and_largest_at_once() -> None:
    f: Callable[[Tensor], Any] = lambda x: torch.aminmax(x, dim=1)  # noqa: E731
    x = torch.randn(1, *SHAPE, dtype=torch.float64)
    assert numerical_norm(f, x) == pytest.approx(bound_of(f, 0 * x), rel=1e-6)
    one = x[:, :1]
    assert numerical_norm(f, one) == pytest.approx(bound_of(f, one), rel=1e-6)


def test_logsumexp() -> None:
    f: Callable[[Tensor], Any] = lambda x: torch.logsumexp(dim=(1, 2), input=x)  # noqa: E731
    assert bound_of(f, torch.zeros(1, *SHAPE)) == 1.0
    assert largest_slope(lambda x: f(30 * x), SHAPE) == pytest.approx(30.0, rel=1e-3)


def test_indices_jump() -> None:
    for f in (lambda x: x.sort(1)[1].double(), lambda x: x.topk(2, 1).indices.double(), lambda x: x.max(1)):
        assert math.isinf(bound_of(f, torch.randn(1, 4)))
    assert "jumps" in report_of(lambda x: x.gather(1, x.argsort(1)), torch.randn(1, 4)).reason


VECTOR_NORMS = [
    lambda x, p, d: torch.norm(x, p, d),
    lambda x, p, d: torch.norm(dim=d, p=p, input=x),
    lambda x, p, d: x.norm(p, dim=d, keepdim=True),
    lambda x, p, d: torch.linalg.vector_norm(x, p, d),
    lambda x, p, d: torch.linalg.vector_norm(dim=d, ord=p, x=x),
]


@pytest.mark.parametrize("norm", VECTOR_NORMS)
@pytest.mark.parametrize("dim", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3.0, math.inf, -math.inf])
def test_vector_norms(norm: Any, dim: tuple[int, ...], p: float) -> None:
    f: Callable[[Tensor], Any] = lambda x: norm(x, p, dim)  # noqa: E731
    bound = bound_of(f, torch.zeros(1, *SHAPE, dtype=torch.float64))
    assert largest_slope(f, SHAPE) <= bound * (1 + 1e-9)
    n = math.prod(SHAPE[d - 1] for d in dim)
    # Attained by equal elements for p < 2, by a single large one for p > 2.
    x = torch.full((1, *SHAPE), 1.0, dtype=torch.float64)
    if p > 2:
        x[:, 1:], x[:, :, 1:] = 1e-9, 1e-9
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v).reshape(-1), x)
    attained = float(torch.linalg.matrix_norm(jacobian.reshape(-1, x.numel()), 2))
    assert bound == pytest.approx(n ** (1 / p - 0.5) if 1 <= p < 2 else 1.0)
    assert attained == pytest.approx(bound, rel=1e-6) or p == -math.inf


@pytest.mark.parametrize("order", [1, 2, math.inf, "fro", "nuc", -1, -2, -math.inf])
@pytest.mark.parametrize("shape", [(2, 5), (5, 2), (3, 3)])
def test_matrix_norms(order: Any, shape: tuple[int, int]) -> None:
    for f in (
        lambda x: torch.linalg.matrix_norm(x, order),
        lambda x: torch.linalg.matrix_norm(x, order, (2, 1)),
        lambda x: torch.linalg.norm(x, order, dim=(1, 2)),
    ):
        bound = bound_of(f, torch.zeros(1, *shape, dtype=torch.float64))
        assert largest_slope(f, shape) <= bound * (1 + 1e-9)
        assert bound <= math.sqrt(5) + 1e-9


@pytest.mark.parametrize("p", [0, 0.5, -1, -2.0])
def test_no_norm(p: float) -> None:
    report = report_of(lambda x: torch.linalg.vector_norm(x, p, 1), torch.randn(1, 4))
    assert math.isinf(report.bound)
    assert "no rule" in report.reason


@pytest.mark.parametrize(
    "f", [lambda x: x.norm(), torch.linalg.vector_norm, lambda x: x.median(), lambda x: x.logsumexp(0)]
)
def test_over_the_batch(f: Callable[[Tensor], Any]) -> None:
    assert "batch" in report_of(f, torch.randn(1, 4)).reason


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x.split(x.size(1) // 2, 1)
    return a, b


SORTING_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "min and max": lambda x: torch.cat([torch.min(*halves(x)), torch.max(*halves(x))], dim=1),
    "max and min": lambda x: (lambda a, b: torch.cat((torch.max(a, b), torch.min(a, b)), 1))(*halves(x)),
    "neighbours": lambda x: torch.stack(
        (torch.maximum(x[:, ::2], x[:, 1::2]), torch.minimum(x[:, ::2], x[:, 1::2])), 2
    ).flatten(1, 2),
    "amax and amin": lambda x: (lambda y: torch.cat((y.amax(2), y.amin(2)), 1))(x.view(x.shape[0], -1, 2)),
    "values": lambda x: (lambda y: torch.cat((y.max(2)[0], y.min(2).values), 1))(x.view(x.shape[0], -1, 2)),
    "groups": lambda x: x.view(x.shape[0], -1, 3).sort(2)[0].reshape(x.shape),
    "groups across": lambda x: torch.sort(x.reshape(x.shape[0], 3, -1), dim=1, descending=True).values.flatten(1),
    "all": lambda x: torch.sort(x, 1)[0],
    "absolute values": torch.abs,
}


@pytest.mark.parametrize("name", SORTING_ACTIVATIONS)
def test_sorting_activations_preserve_norms(name: str) -> None:
    f = SORTING_ACTIVATIONS[name]
    assert bound_of(f, torch.zeros(1, 12, dtype=torch.float64)) == 1.0
    assert largest_slope(f, (12,)) == pytest.approx(1.0)
    report = report_of(
        nn.Sequential(nn.Linear(12, 12), type("Own", (nn.Module,), {"forward": lambda s, x: f(x)})()),
        torch.randn(1, 12),
    )
    assert report.bound == report.layers[0].bound


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans()), min_size=1, max_size=4))
def test_other_pairs_of_extremes(parts: list[tuple[int, int, bool]]) -> None:
    def f(x: Tensor) -> Tensor:
        pieces = [x[:, :3], x[:, 3:], x[:, 1:4], 2 * x[:, :3]]
        return torch.cat([(torch.max if larger else torch.min)(pieces[i], pieces[j]) for i, j, larger in parts], 1)

    assert bound_of(f, torch.zeros(1, 6, dtype=torch.float64)) >= largest_slope(f, (6,), samples=2) * (1 - 1e-9)


def test_extremes_of_one_element_are_that_element_twice() -> None:
    f: Callable[[Tensor], Any] = lambda x: torch.cat((x[..., None].amax(2), x[..., None].amin(2)), 1)  # noqa: E731
    assert bound_of(f, torch.zeros(1, 4)) == pytest.approx(math.sqrt(2))


def test_parts_of_a_tensor_together_are_the_tensor() -> None:
    for f, truth in (
        (lambda x: (lambda parts: torch.cat((parts[2], parts[0], parts[1]), 1))(x.chunk(3, 1)), 1.0),
        (lambda x: torch.cat((x[:, 3:], x[:, :4]), 1), math.sqrt(2)),
        (lambda x: x.repeat(1, 4)[:, :6], 1.0),
        (lambda x: x.unbind(1), 1.0),
    ):
        assert bound_of(f, torch.randn(1, 6)) == pytest.approx(truth)
