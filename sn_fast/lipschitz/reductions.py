"""Constants of reductions over whole dimensions: mean, sum, norms; of sorting, and of the largest elements."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .rounding import loosened, root
from .rules import Call, Constant, joint_rule, no_bound, rule
from .sums import elementwise_choice

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


@rule("amax", "amin", "logsumexp", "special_logsumexp")
@rule("median", "nanmedian", "kthvalue")
def _one_of_each_set(call: Call) -> float | Constant:
    # |max x - max y| <= max |x - y| in each set of elements, and the sets are disjoint; so has every other order
    # statistic, and log-sum-exp, whose gradient is a softmax
    call.allows("k")
    count = _reduced(call, default=-1 if "kthvalue" in call.kind else None)
    return count if isinstance(count, Constant) else 1.0


@rule("aminmax")
def _aminmax(call: Call) -> float | Constant:
    # two elements of the sorted set, the same one if there is one only
    count = _reduced(call)
    return count if isinstance(count, Constant) else root(2) if count == 1 else 1.0


@rule("sort", "msort", "topk")
def _sort(call: Call) -> float:
    # |sort x - sort y| <= |x - y| (rearrangement inequality)
    call.allows("dim", "k", "largest", "sorted", "stable", "descending")
    return 1.0


@rule("cummax", "cummin")
def _cummax(call: Call) -> float | Constant:
    # each element of the result is one before it: at most n times the same
    count = _reduced(call)
    return count if isinstance(count, Constant) else root(count)


@joint_rule("max", "min")
def _max(call: Call) -> float | Constant:
    if isinstance(call.get("other", None), Tensor):
        return elementwise_choice(call)
    count = _reduced(call)
    return count if isinstance(count, Constant) else call.bound("input")


@rule("norm", "linalg_norm", "linalg_vector_norm", "linalg_matrix_norm", "frobenius_norm")
def _norm(call: Call) -> float | Constant:
    # the largest |y|_p with |y|_2 = 1
    name = call.kind.strip("_")
    dims = call.get("dim", (-2, -1) if name == "linalg_matrix_norm" else None)
    order = call.get("p", call.get("ord", "fro" if name in ("norm", "linalg_matrix_norm") else None))
    if touches_batch(call.x, dims):
        return no_bound(f"{call.kind} runs over the batch dimension: no bound per sample")
    sizes = [call.x.shape[d] for d in _listed(dims)]
    # torch.norm means vectors also over two dimensions.
    of_matrices = len(sizes) == 2 and name in ("linalg_norm", "linalg_matrix_norm") and order is not None
    if order in (None, "fro"):
        return 1.0
    if order == "nuc":
        return root(min(sizes)) if len(sizes) == 2 else no_bound(f"no rule for {call.kind} with p={order!r}")
    p = float(order)
    constant = _matrix_norm_constant(p, *sizes) if of_matrices else _norm_constant(p, math.prod(sizes))
    return no_bound(f"no rule for {call.kind} with p={order!r}") if constant is None else constant


def _norm_constant(p: float, n: int) -> float | None:
    """The largest |y|_p of a vector of n elements with |y|_2 = 1."""
    if p >= 2 or p == -math.inf:  # the smallest |y| too changes no more than y
        return 1.0
    return loosened(max(n, 1) ** (1 / p - 0.5)) if p >= 1 else None


def _matrix_norm_constant(p: float, rows: int, columns: int) -> float | None:
    """The same of a matrix norm: the largest singular value, column sum or row sum; for -p the smallest."""
    return {2: 1.0, 1: root(rows), math.inf: root(columns)}.get(abs(p))


def touches_batch(x: Tensor, dims: Dims) -> bool:
    """Whether these dimensions, all of them for None, have the first among them."""
    listed = _listed(dims)
    return not listed or any(d % max(x.ndim, 1) == 0 for d in listed)


def _reduced(call: Call, default: Any = None) -> int | Constant:
    """How many elements go into one."""
    dims = call.get("dim", default)
    if touches_batch(call.x, dims):
        return no_bound(f"{call.kind} runs over the batch dimension: no bound per sample")
    return max(math.prod(call.x.shape[d] for d in _listed(dims)), 1)


def _listed(dims: Any) -> list[int]:
    if dims is None:
        return []
    return [dims] if isinstance(dims, int) else list(dims)
