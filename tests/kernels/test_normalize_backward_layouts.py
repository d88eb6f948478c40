"""Normalisation's gradient for weights, gradients and vectors of any layout."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from sn_fast import ConvOperator, MatrixOperator

from .small_operators import DTYPES, LAYOUTS, unaligned
from .weight_gradients import CHOSEN, Call, same

ANY_LAYOUT = LAYOUTS | {"expanded": lambda w: w[:1].expand(w.shape)}


@pytest.mark.parametrize("of_grad", ANY_LAYOUT)
@pytest.mark.parametrize("of_weight", ANY_LAYOUT)
def test_layouts(kernels: ModuleType, of_weight: str, of_grad: str) -> None:
    for shape, size, options in (
        ((12, 10, 3, 2), (5, 6), {"padding": 1}),
        ((12, 4, 2, 2), (2, 2), {}),  # a matrix, if its columns lie as the input does
        ((12, 3, 2, 2), (5, 5), {"groups": 4}),
    ):
        op = ConvOperator(ANY_LAYOUT[of_weight](torch.randn(shape)), size, **options)  # type: ignore[arg-type]
        call = Call.of(op, group=3 if options.get("groups") else None)
        call.grad = ANY_LAYOUT[of_grad](call.grad)
        call.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_matrices(kernels: ModuleType, dtype: torch.dtype) -> None:
    views = [
        torch.randn(20, 33).T,
        torch.randn(33, 47)[:, 3:23],
        torch.randn(20, 66).T[::2],
        torch.randn(1, 20).expand(33, 20),
        unaligned(torch.randn(33, 20), 3),
    ]
    for view in views:
        weight = torch.empty_strided(view.shape, view.stride(), dtype=dtype).copy_(view) if view.stride(0) else view
        for grad in views:
            call = Call.of(MatrixOperator(weight))
            call.grad = grad.to(dtype)
            call.check()


def test_vectors_of_any_layout(kernels: ModuleType) -> None:
    call = Call.of(CHOSEN["conv"]())
    exact = call.run()
    call.u = call.u.transpose(0, -1).contiguous().transpose(0, -1)
    call.v = torch.stack([call.v, call.v], dim=-1)[..., 0]
    assert same(call.run(), exact)
