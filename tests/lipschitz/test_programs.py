"""Programs drawn at random: views, copies, writes in place, several names of one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sn_fast.lipschitz import lipschitz_bound

from .truth import bound_of, difference, numerical_norm

pytestmark = pytest.mark.usefixtures("rules_alone")
N = 6
CONSTANT = torch.tensor([[1.0, -2.0, 3.0, 0.5, -1.5, 4.0]], dtype=torch.float64)
Step = Callable[[Tensor, Tensor], Any]
# Of two values of shape (1, 6): a new one, or a write into the first.
STEPS: dict[str, Step] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: torch.sub(other=a, input=b, alpha=2),
    "max": torch.maximum,
    "choose": lambda a, b: torch.where(CONSTANT > 0, a, b),
    "branch": lambda a, b: torch.where(a > b, a, b),
    "fold": lambda a, b: a * (a + 2 * b <= 0) - 2 * b * (a + 2 * b > 0),
    "branch that jumps": lambda a, b: torch.where(a > 1, b, a),
    "scale": lambda a, b: a * CONSTANT,
    "halves": lambda a, b: torch.cat((a[:, :3], b[:, 3:]), 1),
    "own halves": lambda a, b: torch.cat((a[:, 3:], a[:, :3]), 1),
    "maxmin": lambda a, b: torch.cat((torch.max(a[:, :3], a[:, 3:]), torch.min(a[:, :3], a[:, 3:])), 1),
    "maxmin of two": lambda a, b: torch.stack((torch.max(a, b), torch.min(a, b))).reshape(2, N)[:, ::2].reshape(1, N),
    "copies": lambda a, b: a[:, [0, 0, 1, 1, 1, 5]],
    "sort": lambda a, b: a.sort(1)[0],
    "view": lambda a, b: a.view(2, 3).view(1, N),
    "alias": lambda a, b: a.data,
    "detach": lambda a, b: a.detach(),
    "clone": lambda a, b: a.clone(),
    "flip": lambda a, b: a.flip(1),
    "add_": lambda a, b: a.add_(b, alpha=-2),
    "mul_": lambda a, b: a.mul_(3.0),
    "relu_": lambda a, b: torch.relu_(a),
    "clamp_": lambda a, b: a.clamp_(min=b),
    "half add_": lambda a, b: (a[:, :3].add_(b[:, 3:]), a)[1],
    "row add_": lambda a, b: (a[0].add_(b[0]), a)[1],
    "data mul_": lambda a, b: (a.data.mul_(-2.0), a)[1],
    "out": lambda a, b: torch.add(a, b, out=torch.empty_like(a)),
    "out of itself": lambda a, b: torch.add(a, b, out=a),
    "write into a constant": lambda a, b: (torch.zeros_like(a) + 2).mul_(b),
    "fill a part": lambda a, b: (a[:, 1:2].zero_(), a)[1],
}


def plus_equal(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


STEPS["+="] = plus_equal


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7),
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
)
def test_programs(steps: list[tuple[str, int, int]], returned: list[int]) -> None:
    def program(x: Tensor) -> Any:
        values = [x * 1.0, x * CONSTANT]
        for name, i, j in steps:
            values.append(STEPS[name](values[i % len(values)], values[j % len(values)]))
        return tuple(values[i % len(values)] for i in returned)

    x = torch.randn(1, N, dtype=torch.float64)
    bound = bound_of(program, x)
    assert numerical_norm(program, x) <= bound * (1 + 1e-6)
    assert max(difference(program, x, 1e-3), difference(program, 3 * x, 1.0)) <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("f", "truth"),
    [
        (lambda x: (lambda y: (y.data.mul_(5), y)[1])(x * 1), 5.0),
        (lambda x: (lambda y: (y.detach().mul_(5), y)[1])(x * 1), 5.0),
        (lambda x: (lambda y: (y.expand(1, 6).mul_(5), y)[1])(x * 1), 5.0),
        (lambda x: (lambda y: plus_equal(y, y))(x * 1), 2.0),
        (lambda x: (lambda y: (plus_equal(y.data, 4 * x), y)[1])(x * 1), 5.0),
        (lambda x: (lambda y: (plus_equal(y, x), y)[1])(x * 1), 2.0),
    ],
)
def test_what_was_written_is_seen_under_every_name(f: Callable[[Tensor], Any], truth: float) -> None:
    assert bound_of(f, torch.zeros(1, 6)) == pytest.approx(truth)


KEPT = torch.zeros(1, 6)


class Keeps(nn.Module):
    """Writes its input into a buffer, and returns what it computes from the buffer."""

    def __init__(self, write: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.write = write
        self.linear = nn.Linear(6, 6)
        self.register_buffer("last", torch.zeros(1, 6))

    def forward(self, x: Tensor) -> Any:
        return self.write(self, x)


@pytest.mark.parametrize(
    "write",
    [
        lambda m, x: (m.last.copy_(x), m.last + 1)[1],
        lambda m, x: (m.last.add_(x), m.last)[1],
        lambda m, x: (torch.mul(x, 5, out=m.last), m.last * 1)[1],
        lambda m, x: (m.last[:, :3].add_(x[:, :3]), m.last)[1],
        lambda m, x: (KEPT.copy_(x), KEPT + 0)[1],
        lambda m, x: (m.linear.weight.data.add_(x), m.linear(x))[1],
        lambda m, x: (m.linear.bias.data.copy_(x[0]), m.linear(x))[1],
    ],
)
def test_a_model_that_keeps_its_input_has_no_bound(write: Callable[[nn.Module, Tensor], Any]) -> None:
    model, x = Keeps(write), torch.zeros(1, 6)
    buffer = model.last.clone()
    report = lipschitz_bound(model, x)
    assert math.isinf(report.bound)
    assert "its own tensors" in report.reason
    assert torch.equal(model.last, buffer)


def test_setting_the_data_of_a_tensor_is_no_graph() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 1
        y.data = 5 * x
        return y

    with pytest.warns(UserWarning, match="'data' of a tensor is set"):
        assert math.isinf(bound_of(f, torch.zeros(1, 3)))


def test_a_stand_in_that_was_copied_is_no_graph() -> None:
    import copy

    with pytest.warns(UserWarning, match="could not be traced"):
        assert math.isinf(bound_of(lambda x: 5 * copy.deepcopy(x), torch.zeros(1, 3)))
