"""Grouped power iteration with weights and vectors of any layout; what is left to the reference."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from sn_fast import ConvOperator, MatrixOperator
from sn_fast.layers import LayerOperator
from sn_fast.ops.layout import Layout
from sn_fast.reference.geometry import Axis, Geometry

from ..attacks.models import same_bits
from .power_steps import Call, planning
from .small_operators import DTYPES, LAYOUTS, conv, matrix, unaligned

ANY_LAYOUT = LAYOUTS | {
    "every_other_column": lambda w: torch.stack([w, w], dim=2)[:, :, 0],
    "first_row_everywhere": lambda w: w[:1].expand(w.shape),
    "taps_with_holes": lambda w: torch.cat([w, w], dim=-1)[..., : w.shape[-1]],
}
LEFT_TO_THE_REFERENCE = ("taps_transposed", "taps_with_holes")


@pytest.mark.parametrize("layout", ANY_LAYOUT)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_convolutions(kernels: ModuleType, layout: str, dtype: torch.dtype) -> None:
    taken = layout not in LEFT_TO_THE_REFERENCE
    for shape, size, options in (
        ((12, 10, 3, 2), (5, 6), {"padding": 1}),
        ((5, 2, 2, 3), (6, 6), {"stride": 2}),
        ((12, 4, 2, 2), (2, 2), {}),  # a matrix, if its columns lie as the input does
        ((12, 3, 2, 2), (5, 5), {"groups": 4}),
    ):
        weight = torch.randn(shape).to(dtype)
        op = ConvOperator(ANY_LAYOUT[layout](weight), size, **options)  # type: ignore[arg-type]
        assert layout == "first_row_everywhere" or torch.equal(op.weight, weight)
        assert (Layout.of(op.weight, op.geometry) is not None) == taken
        call = Call.of(op)
        found = call.check()
        if not taken:
            assert all(map(same_bits, map(torch.stack, found[:3]), map(torch.stack, call.by_reference()[:3])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", [False, True])
def test_layouts_of_matrices(kernels: ModuleType, dtype: torch.dtype, split: bool) -> None:
    views = [
        *(torch.randn(70, 301)[:, i : 200 + i] for i in range(5)),
        *(torch.randn(200, 72).T[i : 60 + i] for i in range(3)),
        *(torch.randn(200, 71).T[i : 60 + i] for i in range(2)),
        torch.randn(70, 200)[:, ::2],
        torch.randn(70, 200).T[:, ::2],
        torch.randn(70, 1).expand(70, 90),
        unaligned(torch.randn(64, 64), 2),
    ]
    with planning(split=split):
        for view in views:
            storage = view.as_strided((view.untyped_storage().nbytes() // 4,), (1,), 0).to(dtype)
            same = storage.as_strided(view.shape, view.stride(), view.storage_offset())
            Call.of(MatrixOperator(same), MatrixOperator(unaligned(same))).check()


def test_layouts_beyond_32_bit_offsets_are_not_taken() -> None:
    for shape, strides in (((3, 3), (2**30, 1)), ((2, 3), (1, 2**30)), ((2, 2, 3), (1, 2, 2**30))):
        weight = torch.empty_strided(shape, strides, device="meta")
        geometry = Geometry((Axis(5, 3, 3, 1, 1, 0),)) if len(shape) == 3 else Geometry()
        taken = sum((n - 1) * s for n, s in zip(shape, strides)) < 2**31
        assert (Layout.of(weight, geometry) is not None) == taken


def test_start_vectors_of_any_layout(kernels: ModuleType) -> None:
    call = Call.of(conv(12, 10, (3, 3), (5, 6), padding=1), matrix(20, 30))
    exact = call.run()
    call.us = [u.transpose(0, -1).contiguous().transpose(0, -1) if u.ndim > 1 else u for u in call.us]
    call.vs = [torch.stack([v, v], dim=-1)[..., 0] for v in call.vs]
    for a, b in zip(call.run(), exact):
        assert all(map(same_bits, a, b))


def test_float64_goes_to_the_reference(kernels: ModuleType) -> None:
    for weight_dtype, dtype in ((torch.float64, torch.float64), (torch.float64, torch.float32), (torch.float32,) * 2):
        op = conv(5, 4, (3,), (7,))
        call = Call.of(LayerOperator(op.weight.to(weight_dtype), op.geometry), matrix(3, 4))
        if weight_dtype == torch.float32:
            dtype = torch.float64
        call.us[0], call.vs[0] = call.us[0].to(dtype), call.vs[0].to(dtype)
        for found, wanted in zip(call.run(), call.by_reference()):
            assert all(map(same_bits, found, wanted))
