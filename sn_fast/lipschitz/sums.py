"""How the bounds of several arguments combine: sums, concatenations, choices."""

from __future__ import annotations

from .rounding import plus, root_of_squares, times
from .rules import Call, Constant, joint_rule, leaves, no_bound


@joint_rule("add", "iadd", "sub", "isub", "rsub", "subtract")
def _add(call: Call) -> float | Constant:
    # |J_a d + alpha J_b d| <= |J_a| + |alpha| |J_b|
    other = call.get("other", 1)
    alpha = abs(call.get("alpha", 2, 1))
    first = times(call.repeated(call.x), call.x_bound)
    second = times(times(float(alpha), call.repeated(other)), call.bound("other", 1))
    return plus((first, second))


@joint_rule("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack")
def _cat(call: Call) -> float:
    # |(J_a d, J_b d)|^2 = |J_a d|^2 + |J_b d|^2
    return root_of_squares(leaves(call.bounds[0] if call.bounds else call.keyword_bounds["tensors"]))


@joint_rule("where")
def _where(call: Call) -> float | Constant:
    # each element of the result is one of the two
    if call.x_bound:
        return no_bound("the condition of where depends on the input: the result jumps")
    pairs = [(call.get(name, i, None), call.bound(name, i)) for name, i in (("input", 1), ("other", 2))]
    return root_of_squares(times(call.repeated(value), bound) for value, bound in pairs)
