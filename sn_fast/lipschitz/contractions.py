"""Constants of matrix products and of other contractions with constant tensors: linear maps, with their norm."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers.linear import MatrixOperator
from .products import bounded
from .rounding import loosened, mul_up, plus, root
from .rules import BadWeights, Call, Constant, Depends, NotCovered, joint_rule, no_bound, rule

_SECOND = {"mm": "mat2", "bmm": "mat2", "mv": "vec", "dot": "tensor", "inner": "other", "outer": "vec2", "ger": "vec2"}
_PRODUCT_OF_TWO = "product of two activations: no finite bound"


@rule("matmul", "imatmul", "mm", "bmm", "mv", "dot", "linalg_matmul", depends=Depends.ONE)
def _matmul(call: Call) -> Constant:
    x, matrix = call.factors("input", _SECOND.get(call.kind, "other"))
    return _product(call, call.get(x), call.get(matrix))


@rule("inner", "outer", "ger", depends=Depends.ONE)
def _inner(call: Call) -> Constant:
    # each vector along the last dimension times the matrix of the other's; or times one row
    x, other = (call.get(name) for name in call.factors("input", _SECOND[call.kind]))
    if x.ndim == 0 or other.ndim == 0:
        return no_bound(f"{call.kind} with a number: no rule")
    return _matrix(call, other.reshape(-1, other.shape[-1]))


@rule("tensordot", depends=Depends.ONE)
def _tensordot(call: Call) -> Constant:
    _, other = call.factors("input", "b")
    dims = call.get("dims", 2)
    constant = call.get(other)
    if isinstance(dims, int):
        contracted = list(range(dims)) if other == "b" else list(range(constant.ndim - dims, constant.ndim))
    elif isinstance(dims, (tuple, list)) and len(dims) == 2:
        listed = dims[1 if other == "b" else 0]
        contracted = [d % constant.ndim for d in ([listed] if isinstance(listed, int) else listed)]
    else:
        raise NotCovered("tensordot with these dims: no rule")
    kept = [d for d in range(constant.ndim) if d not in contracted]
    columns = math.prod(constant.shape[d] for d in contracted)
    return _matrix(call, constant.permute(*kept, *contracted).reshape(-1, columns))


@joint_rule("addmm", "baddbmm", "addmv")
def _addmm(call: Call) -> float | Constant:
    # beta * input + alpha * a @ b
    names = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2")}.get(call.kind.strip("_"), ("mat", "vec"))
    bounds = [call.bound(name) for name in names]
    alpha, beta = abs(float(call.get("alpha", 1))), abs(float(call.get("beta", 1)))
    first = mul_up(mul_up(beta, call.repeated(call.get("input"))), call.bound("input"))
    if all(bounds):
        return no_bound(_PRODUCT_OF_TWO)
    if not any(bounds):
        return first
    x, matrix = (call.get(name) for name in (names if bounds[0] else names[::-1]))
    product = _product(call, x, matrix)
    return Constant(plus((first, mul_up(mul_up(product.value, alpha), max(bounds)))), product.how, product.reason)


@joint_rule("einsum")
def _einsum(call: Call) -> float | Constant:
    equation, *operands = call.get("args")
    bounds: list[Any] = call.parts("args")[0][1:]
    if not isinstance(equation, str):
        return no_bound("einsum without an equation: no rule")
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands, bounds = list(operands[0]), list(bounds[0])
    if sum(b > 0 for b in bounds) > 1:
        return no_bound(_PRODUCT_OF_TWO)
    tracked = max(range(len(bounds)), key=bounds.__getitem__)
    terms, output = _labels(equation, operands)
    norm = _contraction_norm(call, terms, output, operands, tracked)
    return Constant(mul_up(norm.value, bounds[tracked]), norm.how, norm.reason)


def _labels(equation: str, operands: Sequence[Tensor]) -> tuple[list[list[Any]], list[Any]]:
    """The labels of each operand's dimensions, and of the result's: letters, and numbers for those of an ellipsis."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    written = left.split(",")
    if len(written) != len(operands):
        raise NotCovered("einsum whose equation does not fit its operands: no rule")
    extra = [t.ndim - len(w.replace("...", "")) if "..." in w else 0 for w, t in zip(written, operands)]

    def expand(term: str, n: int) -> list[Any]:
        before, dots, after = term.partition("...")
        return [*before, *(range(-n, 0) if dots else ()), *after]  # aligned at the right

    if not arrow:
        letters = left.replace("...", "").replace(",", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return [expand(w, n) for w, n in zip(written, extra)], expand(right, max(extra, default=0))


def _contraction_norm(
    call: Call, terms: list[list[Any]], output: list[Any], operands: Sequence[Tensor], tracked: int
) -> Constant:
    """The norm of a contraction as a linear map of one operand.

    Labels of the operand alone are summed; those that it shares with the constants and with the result number a stack
    of matrices, between what is contracted and what only the constants bring into the result.
    """
    sizes: dict[Any, int] = {}
    for term, t in zip(terms, operands):
        for label, n in zip(term, t.shape):
            sizes[label] = max(sizes.get(label, 1), n)
    # A dimension of size 1 that is broadcast is none.
    kept = [[(x, d) for d, x in enumerate(term) if t.shape[d] == sizes[x]] for term, t in zip(terms, operands)]
    own = {label for label, _ in kept[tracked]}
    constants = [
        (
            [label for label, _ in labels],
            t.detach().double()[tuple(slice(None) if t.shape[d] == sizes[x] else 0 for d, x in enumerate(term))],
        )
        for i, (labels, term, t) in enumerate(zip(kept, terms, operands))
        if i != tracked
    ]
    theirs = {label for labels, _ in constants for label in labels}
    shared = sorted(theirs & own & set(output), key=str)
    added = sorted((theirs - own) & set(output), key=str)
    contracted = sorted((theirs & own) - set(output), key=str)
    summed = root(math.prod(sizes[label] for label in own - theirs - set(output)))
    if not constants:
        return Constant(summed)
    letters = dict(zip(sizes, string.ascii_letters))
    equation = ",".join("".join(letters[label] for label in labels) for labels, _ in constants)
    equation += "->" + "".join(letters[label] for label in (*shared, *added, *contracted))
    stack = torch.einsum(equation, *(t for _, t in constants)).reshape(
        *(math.prod(sizes[label] for label in group) for group in (shared, added, contracted))
    )
    norm = _largest_norm(call, stack)
    return Constant(mul_up(norm.value, summed), norm.how, norm.reason)


def _product(call: Call, x: Tensor, matrix: Tensor) -> Constant:
    """The constant of x @ matrix, or of matrix @ x."""
    batch = math.prod(torch.broadcast_shapes(x.shape[:-2], matrix.shape[:-2]))
    copies = root(batch / max(math.prod(x.shape[:-2]), 1))
    if matrix.ndim == 1:
        matrix = matrix[None]
    norm = _largest_norm(call, matrix.reshape(-1, *matrix.shape[-2:]))
    return Constant(mul_up(norm.value, copies), norm.how, norm.reason)


def _matrix(call: Call, matrix: Tensor) -> Constant:
    return _largest_norm(call, matrix[None])


def _largest_norm(call: Call, stack: Tensor) -> Constant:
    """The largest 2-norm of a stack of matrices, certified."""
    stack = stack.detach()
    if stack.numel() == 0:
        return Constant(0.0)
    if len(stack) == 1:
        return bounded(call, MatrixOperator(stack[0]))
    if not bool(torch.isfinite(stack).all()):
        raise BadWeights(f"layer {call.name!r} ({call.kind}): its constant factor has NaN or infinite elements")
    return Constant(loosened(float(torch.linalg.matrix_norm(stack.double(), 2).max())), "dense")
