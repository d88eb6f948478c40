"""Moves, copies, paddings, sums and reductions against the Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from .truth import bound_of, jacobian_norm, report_of, steepest

SHAPE = (1, 4, 3, 6)
INDEX = torch.tensor([0, 2, 2, 1, 2])
MASK = torch.tensor([True, False, True, False])
EXACT: dict[str, Callable[[Tensor], Any]] = {
    "reshape": lambda x: x.reshape(1, -1),
    "view of its own size": lambda x: x.view(x.size(0), x.shape[1], -1),
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "transpose": lambda x: x.transpose(1, 2),
    "mT": lambda x: x.mT,
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1),
    "flatten": lambda x: torch.flatten(x, 1),
    "slice": lambda x: x[:, 1:, ..., None],
    "chunk": lambda x: x.chunk(2, dim=1)[1],
    "split": lambda x: torch.split(x, 3, dim=1)[0],
    "clone": lambda x: x.clone(),
    "to": lambda x: x.to(torch.float64),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 2),
    "shuffle": nn.ChannelShuffle(2),
    "pixel shuffle": nn.PixelShuffle(2),
    "F.pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": nn.PixelUnshuffle(3),
    "unflatten": nn.Unflatten(1, (2, 2)),
    "Flatten": nn.Flatten(),
    "Identity": nn.Identity(),
    "zero pad": nn.ZeroPad2d(2),
    "constant pad": nn.ConstantPad2d((1, 0, 2, 0), 3.0),
    "F.pad": lambda x: F.pad(x, (1, 1, 2, 0), value=2.0),
    "reflect": nn.ReflectionPad2d((2, 1, 2, 2)),
    "replicate": nn.ReplicationPad2d((3, 1, 0, 2)),
    "circular": nn.CircularPad2d((4, 5, 1, 3)),
    "F.pad reflect": lambda x: F.pad(x, (5, 2, 1, 1), mode="reflect"),
    "F.pad replicate": lambda x: F.pad(x, (5, 2, 1, 1), "replicate"),
    "F.pad circular": lambda x: F.pad(x, (5, 2, 1, 1), mode="circular"),
    "expand": lambda x: x[:, :, None].expand(-1, -1, 5, -1, -1),
    "expand_as": lambda x: x[:, :1].expand_as(x),
    "repeat": lambda x: x.repeat(1, 2, 1, 3),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "index": lambda x: x[:, :, INDEX],
    "list": lambda x: x[:, [0, 0, 1]],
    "mask": lambda x: x[:, MASK],
    "index_select": lambda x: x.index_select(2, INDEX),
    "Unfold": nn.Unfold(2, padding=1),
    "unfold": lambda x: x.unfold(3, 3, 1),
    "detach": lambda x: x.clone(),
    "mean": lambda x: x.mean((2, 3)),
    "mean of one": lambda x: x.mean(dim=-1, keepdim=True),
    "torch.mean": lambda x: torch.mean(x, [1, 2]),
    "sum": lambda x: x.sum(1),
    "torch.sum": lambda x: torch.sum(x, dim=(1, 3)),
    "scale": lambda x: -2.5 * x,
    "divide": lambda x: x / 0.25,
    "channel scale": lambda x: x * torch.tensor([1.0, -3.0, 2.0, 0.5]).reshape(4, 1, 1),
    "mask product": lambda x: x * MASK[:, None, None],
    "broadcast product": lambda x: x[:, :1] * torch.full((4, 1, 1), 1.5),
    "divide by a tensor": lambda x: x / torch.tensor([1.0, -0.5, 2.0])[:, None],
    "add to itself": lambda x: x + x,
    "alpha": lambda x: torch.add(x, x, alpha=2),
    "add a constant": lambda x: 1 - x,
    "broadcast sum": lambda x: x[:, :1] + torch.zeros(1, 4, 1, 1),
    "cat": lambda x: torch.cat([x, x, 2 * x], dim=1),
    "stack": lambda x: torch.stack([x, -x]),
    "shape only": lambda x: torch.zeros_like(x) + x.new_ones(x.shape[1], 1, 1) + x,
    "masked_fill": lambda x: x.masked_fill(MASK[:, None, None], 7.0),
    "where": lambda x: torch.where(MASK[:, None, None], x, 0.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "in place": lambda x: x.clone().mul_(3).add_(1),
    "tuple": lambda x: x.unbind(1)[2],
}


@pytest.mark.parametrize("name", EXACT)
def test_the_constant_is_attained(name: str) -> None:
    f = EXACT[name]
    x = torch.randn(SHAPE, dtype=torch.float64)
    truth = jacobian_norm(f, x)
    bound = bound_of(f, x)
    assert bound >= truth * (1 - 1e-14)
    assert bound == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.amax((2, 3)),
        lambda x: x.max(dim=1).values,
        lambda x: torch.max(x, 1)[0],
        lambda x: torch.maximum(x, 2 * x.flip(3)),
        lambda x: torch.where(MASK[:, None, None], 3 * x, x.flip(1)),
        lambda x: x + 2 * x.flip(1),
        lambda x: torch.cat([x, x.relu(), x[:, :1].expand(-1, 7, -1, -1)], 1),
        lambda x: x[:, :1] + x,
        lambda x: x.mean((2, 3), keepdim=True) - x,
    ],
)
def test_never_below_the_jacobian(f: Callable[[Tensor], Tensor]) -> None:
    bound = bound_of(f, torch.randn(SHAPE, dtype=torch.float64))
    assert steepest(f, SHAPE) <= bound < 6


@given(
    st.sampled_from(["reflect", "replicate", "circular"]),
    st.tuples(st.integers(2, 6), st.integers(2, 6)),
    st.tuples(*[st.integers(0, 5)] * 4),
)
def test_padding(mode: str, size: tuple[int, int], pads: tuple[int, ...]) -> None:
    limit = {"reflect": 1, "circular": 0}.get(mode, -99)
    pads = tuple(min(p, size[1 - i // 2] - limit) for i, p in enumerate(pads))
    x = torch.randn(1, 1, *size, dtype=torch.float64)
    assert bound_of(lambda x: F.pad(x, pads, mode=mode), x) == pytest.approx(
        jacobian_norm(lambda x: F.pad(x, pads, mode=mode), x)
    )


@pytest.mark.parametrize(
    ("f", "says"),
    [
        (lambda x: x.mean(), "batch"),
        (lambda x: x.sum((0, 1)), "batch"),
        (lambda x: x.max(), "batch"),
        (lambda x: x * x, "product of two activations"),
        (lambda x: x @ x.mT, "product of two activations"),
        (lambda x: 1 / x, "first"),
        (lambda x: x / x, "first"),
        (lambda x: x / 0, "zero"),
        (lambda x: x**2, "powers"),
        (lambda x: x.exp(), "powers"),
        (lambda x: x.log(), "slope"),
        (lambda x: torch.where(x > 0, x, 1.0), "jumps"),
        (lambda x: x.long().double(), "jumps"),
        (lambda x: x.to(torch.int64).double(), "integers"),
        (lambda x: x.view(torch.float16), "bits"),
        (lambda x: torch.cumsum(x, 1), "no rule for cumsum"),
        (lambda x: x[:, x.argmax(dim=1)[0, 0, 0]], "jumps"),
    ],
)
def test_says_why_there_is_no_bound(f: Callable[[Tensor], Tensor], says: str) -> None:
    report = report_of(f, torch.rand(SHAPE))
    assert math.isinf(report.bound)
    assert says in report.reason


@pytest.mark.parametrize(
    ("f", "truth"),
    [
        (lambda x: (x, x.mul_(3))[0], 3.0),  # another name of the same tensor
        (lambda x: (x.mul_(3), x)[1], 3.0),
        (lambda x: F.relu(x.mul_(5), inplace=True), 5.0),
    ],
)
def test_writing_in_place_reaches_every_name(f: Callable[[Tensor], Tensor], truth: float) -> None:
    x = torch.randn(SHAPE)
    before = x.clone()
    assert bound_of(f, x) == pytest.approx(truth)
    torch.testing.assert_close(x, before)


def test_writing_through_a_view_is_noticed() -> None:
    def f(x: Tensor) -> Tensor:
        x = x * 1.0
        x[:, :2].mul_(10)
        return x

    report = report_of(f, torch.randn(SHAPE))
    assert math.isinf(report.bound)
    assert "in place" in report.reason
