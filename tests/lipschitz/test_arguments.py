"""Arguments by place, by keyword and in any order; operands that broadcast; in place, into out=, as a method."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sn_fast.lipschitz.binding import bind, name_of

from .truth import bound_of, largest_slope, report_of

pytestmark = pytest.mark.usefixtures("rules_alone")
NAMED = {"alpha": [3, -2.0, 0], "value": [2.0, -3.0], "beta": [0.5, -4]}


def tensor(data: Any, shape: tuple[int, ...]) -> Tensor:
    seed = data.draw(st.integers(0, 50))
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operand(data: Any) -> Callable[[Tensor], Any]:
    """A constant, or something of the input that has one of the shapes above."""
    kind = data.draw(st.sampled_from(["constant", "input", "column", "number"]))
    scale = data.draw(st.sampled_from([1.0, -3.0, 5.0]))
    if kind == "input":
        return lambda x: scale * x
    if kind == "column":
        return lambda x: scale * x.reshape(6, 1)
    if kind == "number":
        return lambda x: scale
    constant = tensor(data, data.draw(st.sampled_from([(1, 6), (4, 6), (6, 1), (6,), (1,)])))
    return lambda x: constant


OPERATIONS: dict[str, tuple[str, ...]] = {
    "add": ("input", "other", "*alpha"),
    "sub": ("input", "other", "*alpha"),
    "subtract": ("input", "other", "*alpha"),
    "rsub": ("input", "other", "*alpha"),
    "mul": ("input", "other"),
    "multiply": ("input", "other"),
    "div": ("input", "other"),
    "true_divide": ("input", "other"),
    "maximum": ("input", "other"),
    "minimum": ("input", "other"),
    "fmax": ("input", "other"),
    "max": ("input", "other"),
    "min": ("input", "other"),
    "logaddexp": ("input", "other"),
    "lerp": ("input", "end", "weight"),
    "addcmul": ("input", "tensor1", "tensor2", "*value"),
    "addcdiv": ("input", "tensor1", "tensor2", "*value"),
    "clamp": ("input", "min", "max"),
    "clip": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "clamp_max": ("input", "max"),
    "where": ("condition", "input", "other"),
    "masked_fill": ("input", "mask", "value"),
}


def drawn_call(data: Any, name: str) -> Callable[[Tensor], Any]:
    """A call of torch.<name> or of the method, its arguments by place or by keyword in any order."""
    parameters = OPERATIONS[name]
    values: dict[str, Callable[[Tensor], Any]] = {}
    for parameter in parameters:
        if parameter[0] == "*":
            if data.draw(st.booleans()):
                number = data.draw(st.sampled_from(NAMED[parameter[1:]]))
                values[parameter[1:]] = lambda x, number=number: number
        elif parameter in ("condition", "mask"):
            mask = tensor(data, data.draw(st.sampled_from([(1, 6), (4, 6), (6, 1)]))) > 0
            values[parameter] = lambda x, mask=mask: mask
        elif name == "masked_fill" and parameter == "value":
            values[parameter] = lambda x: -7.0
        else:
            values[parameter] = operand(data)
    ordered = [p for p in parameters if p[0] != "*"]
    method = data.draw(st.booleans()) and name != "rsub"
    in_place = method and name != "where" and data.draw(st.booleans())
    by_place = data.draw(st.integers(1 if method else 0, len(ordered)))
    keywords = data.draw(st.permutations([p for p in values if p not in ordered[:by_place]]))

    def call(x: Tensor) -> Any:
        if method:
            own, *rest = (["input", "condition", "other"] if name == "where" else ordered)[:by_place]
            named = {k: values[k](x) for k in values if k != own and k not in rest}
            target = values[own](x)
            target = target * 1 if isinstance(target, Tensor) else target
            return getattr(target, name + "_" * in_place)(*(values[p](x) for p in rest), **named)
        return getattr(torch, name)(*(values[p](x) for p in ordered[:by_place]), **{k: values[k](x) for k in keywords})

    return call


@settings(max_examples=60, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", OPERATIONS)
def test_elementwise_calls(name: str, data: Any) -> None:
    call = drawn_call(data, name)
    x = torch.randn(1, 6, dtype=torch.float64)
    try:
        call(x * 1.0)
        truth = largest_slope(call, (6,), samples=1)
    except (TypeError, RuntimeError, AttributeError):
        return  # no call of PyTorch's
    assert bound_of(call, 0 * x) >= truth * (1 - 1e-9)


C = torch.tensor([[1.0, -2.0, 3.0, 0.5, -1.5, 4.0]], dtype=torch.float64)
ATTAINED: dict[str, tuple[Callable[[Tensor], Any], float]] = {
    "other first": (lambda x: torch.sub(other=x, input=5 * x.flip(1)), 6.0),
    "constant other": (lambda x: torch.add(other=C, input=3 * x), 3.0),
    "maximum": (lambda x: torch.maximum(other=C, input=3 * x), 3.0),
    "NumPy's names": (lambda x: torch.add(x1=x, x2=4 * x), 5.0),
    "rsub": (lambda x: torch.rsub(x, C, alpha=3), 3.0),
    "rsub of constants": (lambda x: torch.rsub(C, x, alpha=3), 1.0),
    "limits that broadcast": (lambda x: x[:, :1].clamp(min=C - 100), math.sqrt(6)),
    "a mask that broadcasts": (lambda x: x.masked_fill(torch.zeros(4, 6).bool(), 0.0), 2.0),
    "where of a method": (lambda x: x.where(C > 0, 0 * x), 1.0),
    "written into a constant": (lambda x: (torch.zeros_like(x) + 5).mul_(x), 5.0),
    "added to a constant": (lambda x: operator.iadd(torch.zeros_like(x), 3 * x), 3.0),
    "out": (lambda x: torch.mul(x, 4.0, out=torch.empty_like(x)), 4.0),
    "lerp": (lambda x: torch.lerp(weight=3.0, end=x, input=C), 3.0),
    "tuple of indices": (lambda x: x[:, (0, 0, 0)], math.sqrt(3)),
    "mixed indices": (lambda x: x[..., [2, 2], None], math.sqrt(2)),
    "gather": (lambda x: torch.gather(index=torch.zeros(1, 5).long(), dim=1, input=x), math.sqrt(5)),
    "index_select": (lambda x: torch.index_select(index=torch.tensor([1, 1]), dim=1, input=x), math.sqrt(2)),
    "tile": (lambda x: torch.tile(dims=(2, 2), input=x), 2.0),
    "repeat": (lambda x: x.repeat(2, 2), 2.0),
    "repeated unevenly": (lambda x: torch.repeat_interleave(x, torch.tensor([5, 1, 1, 0, 1, 1]), 1), math.sqrt(5)),
    "pad": (lambda x: F.pad(mode="replicate", pad=(3, 1), input=x), 2.0),
    "new_tensor": (lambda x: x.new_tensor(3 * x), 3.0),
    "new_tensor by name": (lambda x: x.new_tensor(data=(3 * x).detach()), 3.0),
    "data": (lambda x: 3 * x.data, 3.0),
    "detach": (lambda x: (3 * x).detach_(), 3.0),
    "sum over an axis": (lambda x: torch.sum(axis=1, input=x), math.sqrt(6)),
    "leaky_relu": (lambda x: F.leaky_relu(negative_slope=5.0, input=x), 5.0),
    "batch_norm": (
        lambda x: torch.batch_norm(
            x, None, None, torch.zeros(6).double(), torch.ones(6).double(), False, 0.1, 3.0, False
        ),
        0.5,
    ),
    "the same thing returned often": (lambda x: (x, x, 2 * x), math.sqrt(6)),
    "split": (lambda x: torch.split(split_size_or_sections=[2, 4], dim=1, tensor=3 * x)[1], 3.0),
    "parts at unequal places": (lambda x: torch.tensor_split(3 * x, 4, 1)[0], 3.0),
}


@pytest.mark.parametrize("name", ATTAINED)
def test_the_constant_is_that_of_the_call(name: str) -> None:
    f, truth = ATTAINED[name]
    for x in (torch.zeros(1, 6, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)):
        bound = bound_of(f, x)
        assert bound >= truth
        assert bound == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize(
    ("f", "says"),
    [
        (lambda x: torch.add(x, 3, x), "fit no signature"),  # the old order: 3 is alpha
        (lambda x: x.new_full((3,), x[0, 0]), "another argument"),
        (lambda x: F.linear(C, x), "another argument"),
        (lambda x: F.linear(x, C, x[0, :1]), "another argument"),
        (lambda x: torch.addcdiv(C, C, x), "product of two activations"),
        (lambda x: torch.lerp(C, 2 * C, x), "product of two activations"),
        (lambda x: x.where(x > 1, 2 * x), "jumps"),
        (lambda x: x * torch.tensor([3j]), "complex"),
        (lambda x: torch._C._nn.elu(x, 1.0, 3.0), "scale"),
        (lambda x: x.to(torch.float8_e4m3fn).double(), "float8"),
        (lambda x: F.softplus(x, beta=-1.0), "jumps"),
        (lambda x: F.dropout(x, 0.5, True), "random"),
        (lambda x: torch.dropout(x, 0.5, True), "random"),
        (lambda x: x.as_strided((3, 6), (0, 1)), "no rule for as_strided"),
        (lambda x: x.index_add(1, torch.zeros(6).long(), x), "no rule for index_add"),
        (lambda x: torch.zeros_like(x).scatter_add(1, torch.zeros(1, 6).long(), x), "no rule"),
        (lambda x: x.sum(1).item() * x, "no rule for item"),
    ],
)
def test_no_guess(f: Callable[[Tensor], Any], says: str) -> None:
    report = report_of(f, torch.zeros(1, 6, dtype=torch.float64))
    assert math.isinf(report.bound)
    assert says in report.reason


def test_a_function_that_took_a_known_name_has_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    def relu(x: Tensor) -> Tensor:
        return 5 * x

    assert name_of(relu) is None
    assert name_of(F.relu) == name_of(torch.relu) == name_of("relu_") == "relu"
    monkeypatch.setattr(Tensor, "sigmoid", lambda x: 9 * x)
    assert name_of("sigmoid") is None


@pytest.mark.parametrize("target", ["add", torch.add, operator.add, torch.sub, "sub_"])
def test_binding_is_one_for_every_spelling(target: Any) -> None:
    x, y = torch.zeros(2, 3), torch.ones(3)
    assert bind(target, (x, y), {}) == {"input": 0, "other": 1}
    if not callable(target) or target is not operator.add:
        assert bind(target, (x,), {"other": y, "alpha": 2}) == {"input": 0, "other": "other", "alpha": "alpha"}
    assert bind(target, (x, y, y, y), {}) is None
