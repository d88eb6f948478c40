"""Constants of reductions over whole dimensions: mean, sum, largest element."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .rounding import loosened, root, root_of_squares, times
from .rules import Call, Constant, joint_rule, no_bound, rule

Dims = int | tuple[int, ...] | list[int] | None


@rule("mean")
def _mean(call: Call) -> float | Constant:
    # a mean of n elements: n (1/n)^2 = 1/n
    count = _reduced(call)
    return count if isinstance(count, Constant) else loosened(1 / math.sqrt(count))


@rule("sum")
def _sum(call: Call) -> float | Constant:
    count = _reduced(call)
    return count if isinstance(count, Constant) else root(count)


@rule("amax", "amin")
def _amax(call: Call) -> float | Constant:
    # |max x - max y| <= max |x - y| in each set of elements, and the sets are disjoint
    count = _reduced(call)
    return count if isinstance(count, Constant) else 1.0


@joint_rule("max", "min", "maximum", "minimum")
def _max(call: Call) -> float | Constant:
    other = call.get("other", 1, None)
    if isinstance(other, Tensor):
        # each element of the result is one of the two
        pairs = ((call.x, call.x_bound), (other, call.bound("other", 1)))
        return root_of_squares(times(call.repeated(t), bound) for t, bound in pairs)
    count = _reduced(call)
    return count if isinstance(count, Constant) else call.x_bound


def _reduced(call: Call) -> int | Constant:
    """How many elements go into one."""
    dims = call.get("dim", 1, call.get("axis", 1, None))
    if isinstance(dims, torch.dtype) or _touches_batch(call.x, dims):
        return no_bound(f"{call.kind} runs over the batch dimension: no bound per sample")
    return max(math.prod(call.x.shape[d] for d in _listed(dims)), 1)


def _touches_batch(x: Tensor, dims: Dims) -> bool:
    listed = _listed(dims)
    return not listed or any(d % max(x.ndim, 1) == 0 for d in listed)


def _listed(dims: Any) -> list[int]:
    if dims is None:
        return []
    return [dims] if isinstance(dims, int) else list(dims)
