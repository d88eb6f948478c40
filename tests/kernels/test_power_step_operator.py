"""power_step as an operator: its fake, compilation, what it refuses."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sn_fast.ops import power_step as ops
from sn_fast.reference.geometry import Geometry

from ..attacks.models import same_bits
from .power_steps import Call
from .small_operators import conv, line, matrix


def small_call() -> Call:
    return Call.of(matrix(3, 5), line(9, 3, 5), matrix(7, 3), conv(4, 4, (3,), (5,), groups=4))


@pytest.mark.parametrize("n_iterations", [1, 2])
def test_operator_passes_opcheck(kernels: ModuleType, n_iterations: int) -> None:
    call = small_call()
    torch.library.opcheck(ops._power_step, (call.weights, call.us, call.vs, call.code, n_iterations, "fp32"))


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.filterwarnings("error:.*may not alias.*:UserWarning")
def test_compile(kernels: ModuleType, computed: bool) -> None:
    """Also with operands that the compiled code computes itself: it then counts on results aligned to 16 bytes."""
    call = small_call()

    def advance(weights: list[Tensor], us: list[Tensor], vs: list[Tensor]) -> list[Tensor]:
        if computed:
            weights, us, vs = ([x * 2 for x in xs] for xs in (weights, us, vs))
        u, v, sigma, _ = ops.power_step(weights, us, vs, call.code, 1, "fp32")
        return [x * 2 for x in (*u, *v, *sigma)]

    torch._dynamo.reset()
    found = torch.compile(advance, fullgraph=True)(call.weights, call.us, call.vs)
    assert all(map(same_bits, found, advance(call.weights, call.us, call.vs)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"precision": "fp8"}, r"precision='fp8' is unknown; choose one of fp32, tf32, 3xtf32, bf16"),
        ({"us": [torch.zeros(3), torch.zeros(9, 5), torch.zeros(7), torch.zeros(4, 2)]}, r"u has shape \(4, 2\)"),
        ({"vs": [torch.zeros(5), torch.zeros(3, 6), torch.zeros(3), torch.zeros(4, 5)]}, r"v has shape \(3, 6\)"),
        ({"us": [torch.zeros(3)]}, "1 vectors u for 4 weights"),
        ({"vs": []}, "0 vectors v for 4 weights"),
        ({"n_iterations": 0}, "n_iterations=0 must be >= 1"),
        ({"weights": [torch.zeros(3, 5)]}, "1 weights for 4 geometries"),
        ({"geometry": Geometry().encode()}, "4 weights for 1 geometries"),
        ({"weights": [torch.zeros(3, 5)] * 4}, r"a weight of shape \(3, 5\) does not fit its geometry"),
    ],
)
def test_what_the_operator_refuses(kernels: ModuleType, change: dict[str, Any], says: str) -> None:
    call = small_call()
    args = {"weights": call.weights, "us": call.us, "vs": call.vs, "geometry": call.code}
    args |= {"n_iterations": 1, "precision": "fp32"} | change
    with pytest.raises(ValueError, match=says):
        ops.power_step(*(args[name] for name in ("weights", "us", "vs", "geometry", "n_iterations", "precision")))


@pytest.mark.parametrize("names", [["us"], ["vs"], ["weights"], ["us", "vs", "weights"]])
def test_every_tensor_must_be_on_one_device(kernels: ModuleType, names: list[str]) -> None:
    call = small_call()
    tensors = {"weights": call.weights, "us": call.us, "vs": call.vs}
    for name in names:
        tensors[name] = [*tensors[name][:2], tensors[name][2].to("meta"), *tensors[name][3:]]
    says = {"us": "u is on meta", "vs": "v is on meta"}.get("".join(names), r"weights are on .* and on meta")
    with pytest.raises(ValueError, match=says):
        ops._power_step_kernel(kernels, *tensors.values(), call.code, 1, "fp32")
