"""normalize and normalize_backward as operators: their fakes, what they refuse, what they leave to the reference."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from sn_fast import ConvOperator
from sn_fast.layers import LayerOperator
from sn_fast.ops import normalize as ops

from ..on_device import DEVICE
from .weight_gradients import CHOSEN, INF, Call, same


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_opcheck(kernels: ModuleType, dtype: torch.dtype) -> None:
    """Shapes and strides of the fakes are those of the kernels, in every layout."""
    kernel = torch.randn(6, 4, 3, 2).to(dtype)
    laid_out = [kernel, kernel.contiguous(memory_format=torch.channels_last), kernel[:, :, :, :1]]
    laid_out.append(laid_out[1][:, :3])
    sigma = torch.tensor(1.3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    n = len(laid_out)
    torch.library.opcheck(
        torch.ops.sn_fast.normalize.default, (laid_out, [sigma] * n, [0.5, 2.0, INF, 0.5], [True, False, True, True])
    )
    for weight in laid_out[:2]:
        op = ConvOperator(weight, (5, 6), padding=1)
        call = Call.of(op)
        u, v = call.u.to(sigma.dtype), call.v.to(sigma.dtype)
        grads = [call.grad, call.grad.contiguous(memory_format=torch.channels_last), call.grad[:1].expand(6, 4, 3, 2)]
        for grad in grads:
            arguments = (grad, weight, sigma, u, v, None, call.code, 0.5, True)
            torch.library.opcheck(torch.ops.sn_fast.normalize_backward.default, arguments)


def test_gradients_in_float64_go_to_the_reference(kernels: ModuleType) -> None:
    """Where any operand is float64."""
    for chosen in ("grad", "u", "v", "sigma"):
        call = Call.of(CHOSEN["conv"]())
        setattr(call, chosen, getattr(call, chosen).double())
        assert same(call.run(), call.by_reference())
    op = CHOSEN["conv"]()
    call = Call.of(LayerOperator(op.weight.double(), op.geometry))
    assert same(call.run(), call.by_reference())
    call.grad = call.grad.float()
    assert same(call.run(), call.by_reference())


def test_wrong_arguments_are_named(kernels: ModuleType) -> None:
    call = Call.of(CHOSEN["conv"]())

    def run(precision: str = "fp32", **changes: Any) -> None:
        replace(call, **changes).run(precision)

    for changes, says in (
        ({"grad": call.grad[:1]}, r"grad has shape \(1, 12, 3, 3\)"),
        ({"u": call.u[:1]}, r"u has shape \(1, 9, 8\).* \(20, 9, 8\)"),
        ({"u": call.u.flatten()}, r"u has shape"),
        ({"v": call.v[:, 1:]}, r"v has shape"),
        ({"sigma": torch.ones(2)}, r"sigma has shape \(2,\)"),
        ({"precision": "fp16"}, r"'fp16' is unknown; choose one of fp32"),
    ):
        with pytest.raises(ValueError, match=says):
            run(**changes)  # type: ignore[arg-type]
    w, one = torch.randn(3, 3), torch.ones(())
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\)"):
        torch.ops.sn_fast.normalize([w], [torch.ones(3)], [1.0], [True])
    with pytest.raises(ValueError, match="shorter"):
        torch.ops.sn_fast.normalize([w, w], [one], [1.0, 1.0], [True, True])


def test_tensors_of_several_devices_are_named(kernels: ModuleType) -> None:
    """The kernels' own functions: the dispatcher would take a meta tensor for a call to the fakes."""
    call = Call.of(CHOSEN["grouped"]())
    for name in ("grad", "sigma", "u", "v", "group"):
        moved = replace(call, **{name: getattr(call, name).to("meta")})
        arguments = moved.grad, call.op.weight, moved.sigma, moved.u, moved.v, moved.group, call.code, 0.5, True
        with pytest.raises(ValueError, match=f"{name} is on meta, the weight on {DEVICE.type}"):
            ops._normalize_backward_kernel(kernels, *arguments)
    w, one = torch.randn(3, 3), torch.ones(())
    for weights, sigmas, says in (
        ([w, w], [one, one.to("meta")], f"sigma is on meta, its weight on {DEVICE.type}"),
        ([w, w.to("meta")], [one, one.to("meta")], f"weights are on {DEVICE.type}.* and .*meta"),
    ):
        with pytest.raises(ValueError, match=says):
            ops._normalize_kernel(kernels, weights, sigmas, [1.0, 1.0], [True, True])
