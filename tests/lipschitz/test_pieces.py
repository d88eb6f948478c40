"""Activations whose branch depends on the input: bounded where they are continuous, and only there."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .truth import bound_of, report_of, steepest

SHAPES = [(8,), (8, 3, 2)]


class Householder(nn.Module):
    """z - 2 max(<n, z>, 0) n for pairs z of channels and n = (sin(theta / 2), -cos(theta / 2)), written with masks."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Tensor], angle: float = 1.0) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(4, dtype=torch.float64))
        self.write, self.angle = write, angle

    def forward(self, z: Tensor) -> Tensor:
        theta = self.angle * self.theta.view((1, -1) + (1,) * (len(z.shape) - 2))
        x, y = z.split(z.shape[1] // 2, 1)
        return self.write(x, y, theta)


def _switch(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    return x * torch.sin(0.5 * theta) - y * torch.cos(0.5 * theta)


def _reflected(x: Tensor, y: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    c, s = torch.cos(theta), torch.sin(theta)
    return x * c + y * s, x * s - y * c


def by_masks(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    switch, (a, b) = _switch(x, y, theta), _reflected(x, y, theta)
    return torch.cat([x * (switch <= 0) + a * (switch > 0), y * (switch <= 0) + b * (switch > 0)], 1)


def by_where(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    half = theta / 2
    switch = torch.cos(half) * y - torch.sin(half) * x
    a, b = x * torch.cos(2 * half) + torch.sin(half + half) * y, torch.sin(theta) * x - y * torch.cos(theta)
    return torch.stack((torch.where(switch >= 0, x, a), torch.where(switch < 0, b, y)), 1)


def by_float_mask(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    mask, (a, b) = (_switch(x, y, theta) > 0).to(x.dtype), _reflected(x, y, theta)
    return torch.cat([mask * a + (1 - mask) * x, y + (b - y) * mask], 1)


def wrong_angle(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    (a, b), switch = _reflected(x, y, theta), x * torch.sin(theta) - y * torch.cos(theta)
    return torch.cat([torch.where(switch > 0, a, x), torch.where(switch > 0, b, y)], 1)


def other_edge(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    (a, b), switch = _reflected(x, y, theta), _switch(x, y, theta)
    return torch.cat([x * (switch < 1) + a * (switch >= 1), y * (switch < 1) + b * (switch >= 1)], 1)


def other_side(x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
    # Both are no steeper than 1, but reflect different halves.
    (a, b), switch = _reflected(x, y, theta), _switch(x, y, theta)
    return torch.cat([torch.where(switch > 0, a, x), torch.where(switch < 0, b, y)], 1)


@pytest.mark.usefixtures("rules_alone")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("write", [by_masks, by_where, by_float_mask])
@pytest.mark.parametrize("scale", [1.0, 1 / math.sqrt(2)])
def test_householder(write: Callable[..., Tensor], scale: float, shape: tuple[int, ...]) -> None:
    for angle in (1.0, 0.3, 0.0):
        layer = Householder(lambda x, y, theta: write(x, y, theta) * scale, angle)
        layer.theta.data.mul_(3)
        truth, report = steepest(layer, (1, *shape), 5), report_of(layer, torch.randn(1, *shape, dtype=torch.float64))
        assert truth <= report.bound * (1 + 1e-12)
        assert report.bound == pytest.approx(scale, rel=1e-12)
        assert all(math.isfinite(row.bound) for row in report.layers)


@pytest.mark.usefixtures("rules_alone")
@pytest.mark.parametrize("write", [wrong_angle, other_edge])
def test_what_jumps_has_no_bound(write: Callable[..., Tensor]) -> None:
    report = report_of(Householder(write), torch.randn(1, 8, dtype=torch.float64))
    assert math.isinf(report.bound)
    assert "jumps" in report.reason


@pytest.mark.usefixtures("rules_alone")
def test_pieces_of_different_sides_are_taken_together_as_they_are() -> None:
    layer = Householder(other_side)
    bound = bound_of(layer, torch.randn(1, 8, dtype=torch.float64))
    assert steepest(layer, (1, 8), 50) <= bound <= math.sqrt(2) * (1 + 1e-9)


SLOPE = torch.tensor([[0.5, -1.5, 2.0]], dtype=torch.float64)


@pytest.mark.usefixtures("rules_alone")
@pytest.mark.parametrize(
    ("f", "truth"),
    [
        (lambda x: x * (x > 0), 1.0),
        (lambda x: x * ~(x <= 0), 1.0),
        (lambda x: (x - 0.5) * (x > 0.5), 1.0),
        (lambda x: x * (x > 0) + 0.1 * x * (x <= 0), 1.0),
        (lambda x: torch.where(x > 0, x, SLOPE * x), 2.0),
        (lambda x: x.where(x > 0, 2 * x), 2.0),
        (lambda x: torch.where(x > 1, 1.0, x), 1.0),
        (lambda x: torch.where(x < 0, -x, x), 1.0),
        (lambda x: x * ((x > 0).double() - (x < 0).double()), 1.0),
        (lambda x: torch.cat((torch.relu(x), torch.relu(-x)), 1), 1.0),
        (lambda x: torch.cat((x.relu(), x.abs()), 1), math.sqrt(2)),
        (lambda x: torch.rsub(x, 3, alpha=2) * (x < 1.5) + (3 - 2 * x) * (x >= 1.5), 2.0),
        (lambda x: x * (x > 1), math.inf),
        (lambda x: (x > 0).double(), math.inf),
        (lambda x: torch.where(x > 1, 1.1, x), math.inf),
        (lambda x: (x + 1) * (x <= 0) + (x + 1) * (x >= 0), math.inf),  # twice as large at 0
        (lambda x: (x + 1) * (x < 0) + (x + 1) * (x > 0), math.inf),  # 0 at 0
        (lambda x: torch.where(x[:, :2] > x[:, 1:], x[:, :2], 0.0), math.inf),
        (lambda x: x * (x > 0).sum(1), math.inf),
        (lambda x: x * (x.clone().mul_(2) > 1), math.inf),
        (lambda x: (lambda y: (lambda m: y.add_(3) * m)(y > 0))(x * 1.0), math.inf),  # y is another when it is used
        (lambda x: x[:, :1] * (x > 0), math.inf),
    ],
)
def test_written_with_masks(f: Callable[[Tensor], Tensor], truth: float) -> None:
    bound = bound_of(f, torch.randn(1, 3, dtype=torch.float64))
    assert bound == pytest.approx(truth, rel=1e-9)


@pytest.mark.usefixtures("rules_alone")
def test_sources_that_overlap() -> None:
    def f(x: Tensor) -> Tensor:
        return torch.where(2 * x[:, :2] > x[:, 1:], 2 * x[:, :2] - x[:, 1:], 0.0)

    assert steepest(f, (1, 3)) <= bound_of(f, torch.randn(1, 3, dtype=torch.float64)) <= math.sqrt(10) * (1 + 1e-9)


LEAVES = ["x", "y", "x + y", "2 * x - y", "0.5 * y", "-x", "x - 1", "0 * x"]


@pytest.mark.usefixtures("rules_alone")
@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(LEAVES),
    st.sampled_from(["<", "<=", ">", ">="]),
    *(st.sampled_from(LEAVES) for _ in range(4)),
    st.floats(-2, 2),
)
def test_two_pieces_drawn_at_random(s: str, sign: str, a: str, b: str, c: str, d: str, k: float) -> None:
    """Either infinite, or above each difference quotient across the switch; drawn so that half are continuous."""
    code = f"torch.cat(((s {sign} 0) * ({a}) + ~(s {sign} 0) * ({b}), torch.where(s > 0, {c}, ({c}) + k * s)), 1)"
    if d == b:
        code = code.replace(f"~(s {sign} 0) * ({b})", f"(({a}) + k * s) * ~(s {sign} 0)")
    program = eval(f"lambda x, y, s: {code}", {"torch": torch, "k": k})

    def f(z: Tensor) -> Tensor:
        x, y = z.chunk(2, 1)
        return program(x, y, eval(s, {"x": x, "y": y}))

    bound = bound_of(f, torch.randn(1, 4, dtype=torch.float64))
    if math.isfinite(bound):
        z = torch.randn(300, 1, 4, dtype=torch.float64)
        for step in (1e-6, 1e-2, 1.0):
            w = z + step * torch.randn_like(z)
            slopes = [float((f(p) - f(q)).norm() / (p - q).norm()) for p, q in zip(z, w)]
            assert max(slopes) <= bound * (1 + 1e-6) + 1e-9 / step


@pytest.mark.parametrize("channels", [4, 8])
def test_activations_of_other_packages(channels: int) -> None:
    activations = pytest.importorskip("deel.torchlip.modules.activation")
    x = torch.randn(1, channels, 3, 3)
    for layer in (activations.HouseHolder(channels), activations.GroupSort2(), activations.MaxMin()):
        assert bound_of(layer, x) == pytest.approx(1.0)
    theirs = pytest.importorskip("orthogonium.layers.custom_activations")
    assert bound_of(theirs.HouseHolder(channels), x) == pytest.approx(1 / math.sqrt(2))
