"""Products with constant tensors against the matrix of the linear map."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .truth import bound_of, jacobian_norm, report_of

pytestmark = pytest.mark.usefixtures("rules_alone")
CLOSE = 2e-2
W = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
STACK = torch.randn(5, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@st.composite
def contractions(draw: Any) -> tuple[str, int, dict[str, int]]:
    """An equation of two or three operands, which of them is the input, and the sizes of its labels."""
    labels = "abcde"
    sizes = {label: draw(st.integers(1, 3)) for label in labels}
    n = draw(st.integers(1, 3))
    terms = [draw(st.lists(st.sampled_from(labels), min_size=1, max_size=3)) for _ in range(n)]
    used = sorted(set().union(*terms))
    output = draw(st.lists(st.sampled_from(used), unique=True, max_size=3))
    equation = ",".join("".join(t) for t in terms)
    if draw(st.booleans()):
        equation += "->" + "".join(output)
    return equation, draw(st.integers(0, n - 1)), sizes


@settings(max_examples=200, deadline=None)
@given(contractions(), st.booleans(), st.booleans())
def test_einsum(drawn: tuple[str, int, dict[str, int]], as_list: bool, ones: bool) -> None:
    equation, position, sizes = drawn
    terms = equation.partition("->")[0].split(",")
    operands = [torch.randn([sizes[label] for label in t], dtype=torch.float64) for t in terms]
    if ones:  # dimensions that are broadcast
        operands = [t[..., :1] if i == 1 else t for i, t in enumerate(operands)]

    def f(x: Tensor) -> Tensor:
        given = [x if i == position else t for i, t in enumerate(operands)]
        return torch.einsum(equation, given) if as_list else torch.einsum(equation, *given)

    try:
        truth = jacobian_norm(f, operands[position])
    except RuntimeError:
        return  # no equation of PyTorch's
    bound = bound_of(f, operands[position])
    assert truth * (1 - 1e-9) <= bound
    repeated = len(set(terms[position])) < len(terms[position])  # a diagonal that is summed is bounded by its norm
    assert bound <= truth * (1 + CLOSE) + 1e-12 or repeated


ATTAINED: dict[str, Callable[[Tensor], Tensor]] = {
    "ellipsis": lambda x: torch.einsum("...i,oi->...o", x, W),
    "ellipsis that broadcasts": lambda x: torch.einsum("...i,...i->...i", x, W),
    "ellipsis that is summed": lambda x: torch.einsum("...i,oi->o", x, W),
    "mm": lambda x: torch.mm(mat2=W.T, input=x),
    "mv": lambda x: torch.mv(W, vec=x[0]),
    "dot": lambda x: torch.dot(W[0], x[0]),
    "matmul": lambda x: torch.matmul(other=x.T, input=W),
    "rows": lambda x: x.expand(3, 6) @ W[0],
    "inner": lambda x: torch.inner(W, x),
    "outer": lambda x: torch.outer(W[0], vec2=x[0]),
    "tensordot": lambda x: torch.tensordot(x, W, dims=([1], [1])),
    "tensordot reversed": lambda x: torch.tensordot(b=x, a=W, dims=([1], [1])),
    "tensordot of the last": lambda x: torch.tensordot(x, W.T, 1),
    "addmm": lambda x: torch.addmm(W, W, mat2=x.reshape(6, 1).expand(6, 6), alpha=3, beta=0.5),
    "addmm of the first": lambda x: torch.addmm(mat1=W, mat2=W.T, input=x[0, :4], beta=-3),
}


@pytest.mark.parametrize("name", ATTAINED)
def test_products_by_name_and_by_place(name: str) -> None:
    f, x = ATTAINED[name], torch.randn(1, 6, dtype=torch.float64)
    truth = jacobian_norm(f, x)
    assert truth * (1 - 1e-12) <= bound_of(f, x) <= truth * (1 + CLOSE)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.matmul(x, STACK),
        lambda x: STACK.mT @ x.T,
        lambda x: torch.bmm(x[None].expand(5, 1, 6), STACK),
        lambda x: torch.addmm(2 * x[:, :4], x, W.T, alpha=3),
        lambda x: torch.baddbmm(batch2=STACK, batch1=x[None].expand(5, 1, 6), input=x[:, :3].expand(5, 1, 3), alpha=-2),
        lambda x: torch.addmv(x[0, :4], W, x[0], alpha=2, beta=3),
    ],
)
def test_products_with_stacks_and_sums(f: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 6, dtype=torch.float64)
    truth = jacobian_norm(f, x)
    assert truth <= bound_of(f, x) <= 2.5 * truth


@pytest.mark.parametrize(
    "f",
    [
        lambda x: torch.einsum("bi,bi->b", x, x),
        lambda x: torch.addmm(W, W, x.T @ x),
        lambda x: torch.addmm(x[:, :4], x.expand(4, 6), (x * W).T),
        lambda x: torch.tensordot(x, x, 2),
        lambda x: torch.outer(x[0], x[0]),
    ],
)
def test_products_of_the_input_with_itself(f: Callable[[Tensor], Tensor]) -> None:
    report = report_of(f, torch.zeros(1, 6, dtype=torch.float64))
    assert math.isinf(report.bound)
    assert "product of two activations" in report.reason


def test_a_constant_that_is_no_number_is_named() -> None:
    for bad in (W * math.nan, torch.stack((W.T, W.T * math.inf))):
        with pytest.raises(ValueError, match="NaN"):
            bound_of(lambda x, bad=bad: torch.matmul(x, bad if bad.ndim == 3 else bad.T), torch.ones(1, 6).double())
