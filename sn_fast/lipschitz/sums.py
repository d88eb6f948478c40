"""How the bounds of several arguments combine: sums, concatenations, choices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .origins import joint_bound
from .rounding import mul_up, next_up, plus, root_of_squares
from .rules import Call, Constant, NotCovered, joint_rule, no_bound


@joint_rule("add", "iadd", "sub", "isub", "rsub", "subtract")
def _add(call: Call) -> float:
    # |J_a d + alpha J_b d| <= |J_a| + |alpha| |J_b|
    scaled = "input" if call.kind == "rsub" else "other"
    alpha = abs(float(call.get("alpha", 1)))
    return plus(mul_up(_spread(call, n), alpha if n == scaled else 1.0) for n in ("input", "other"))


@joint_rule("lerp")
def _lerp(call: Call) -> float | Constant:
    # (1 - w) a + w b
    if call.bound("weight"):
        return no_bound("product of two activations: no finite bound")
    weight = call.get("weight")
    weight = weight.detach().double() if isinstance(weight, Tensor) else weight
    first, second = magnitude(1 - weight), magnitude(weight)
    return plus((mul_up(first, _spread(call, "input")), mul_up(second, _spread(call, "end"))))


@joint_rule("addcmul", "addcdiv")
def _addcmul(call: Call) -> float | Constant:
    # a + value b c, or a + value b / c
    names = ("tensor1", "tensor2")
    product = 0.0
    if any(call.bound(n) for n in names):
        divides = call.kind.startswith("addcdiv")
        if all(call.bound(n) for n in names) or (divides and call.bound("tensor2")):
            return no_bound("product of two activations: no finite bound")
        x, factor = names if call.bound("tensor1") else names[::-1]
        size = inverse(call.get(factor)) if divides else magnitude(call.get(factor))
        product = mul_up(mul_up(abs(float(call.get("value", 1))), size), _spread(call, x))
    return plus((_spread(call, "input"), product))


@joint_rule("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack")
@joint_rule("atleast_1d", "atleast_2d", "atleast_3d")
def _cat(call: Call) -> float:
    # |(J_a d, J_b d)|^2 = |J_a d|^2 + |J_b d|^2
    call.allows("dim")
    return joint_bound(*call.parts("tensors"))


@joint_rule("where")
def _where(call: Call) -> float | Constant:
    # each element of the result is one of the two
    if call.bound("condition"):
        return no_bound("the condition of where depends on the input: the result jumps")
    return root_of_squares(_spread(call, n) for n in ("input", "other"))


@joint_rule("maximum", "minimum", "fmax", "fmin", "logaddexp", "logaddexp2")
def elementwise_choice(call: Call) -> float:
    # each element of the result is one of the two, or a mean of both (of their slopes)
    return root_of_squares(_spread(call, n) for n in ("input", "other"))


@joint_rule("new_tensor")
def _new_tensor(call: Call) -> float | Constant:
    # a copy of the other argument; of the first only dtype and device are used
    call.ignores("input", "device")
    call.allows("pin_memory", "layout")
    if not isinstance(call.get("data"), Tensor):
        return no_bound("a tensor made of numbers that depend on the input: no rule")
    return call.bound("data")


def _spread(call: Call, name: str) -> float:
    """The bound of an argument as it is broadcast to the result."""
    return mul_up(call.repeated(call.get(name)), call.bound(name)) if call.bound(name) else _given(call, name)


def _given(call: Call, name: str) -> float:
    call.get(name)
    return 0.0


def magnitude(factor: Any) -> float:
    """The largest absolute value of a constant factor."""
    if isinstance(factor, Tensor):
        return float(_sizes(factor).max()) if factor.numel() else 0.0
    return float(abs(factor))


def inverse(divisor: Any) -> float:
    """The largest absolute value of the inverse of a constant."""
    if isinstance(divisor, Tensor):
        smallest = float(_sizes(divisor).min()) if divisor.numel() else 1.0
    else:
        smallest = float(abs(divisor))
    if smallest == 0:
        raise NotCovered("division by zero")
    return next_up(1 / smallest)


def _sizes(t: Tensor) -> Tensor:
    t = t.detach()
    return t.abs() if t.is_complex() else t.double().abs()
