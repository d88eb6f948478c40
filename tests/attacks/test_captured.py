"""What may be captured in a CUDA graph copies nothing from the host: no number becomes a CPU tensor on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sn_fast import attacks
from sn_fast.reference import pgd_step as pgd_reference
from sn_fast.reference import random_start as drawn
from sn_fast.reference import wrm_step as wrm_reference

from ..on_device import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="stands in for a GPU, where graphs themselves are tested")

_FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)


class _NoMakers(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _FROM_HOST, f"{func.__name__} copies from the host"
        return func(*args, **(kwargs or {}))


class _NoTensorsOfTheHost(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves((args, kwargs, results)):
            assert not isinstance(t, Tensor) or t.is_meta, f"{func} meets a tensor of the CPU"
        return results


def on_device(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of a device whose memory the host cannot reach."""
    return torch.empty(shape, dtype=dtype, device="meta")


def check(call: Callable[[], Tensor]) -> None:
    with _NoMakers(), _NoTensorsOfTheHost():
        assert call().is_meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["inf", "2", "1", "1-exact"])
@pytest.mark.parametrize("bound", [None, 0.25, math.inf, "number", "channel", "full"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_references(dtype: torch.dtype, norm: str, bound: float | str | None, per_sample: bool) -> None:
    x_adv, x, grad = (on_device(3, 2, 5, 4, dtype=dtype) for _ in range(3))
    shapes = {"number": (), "channel": (2, 1, 1), "full": (3, 2, 5, 4)}
    clip = (on_device(*shapes[bound]), None) if isinstance(bound, str) else (bound, bound)
    amounts = on_device(3) if per_sample else None
    active = on_device(3, dtype=torch.bool) if per_sample else None
    seed = on_device(dtype=torch.int64)
    for targeted in (False, True):
        for eps in (0.3, math.inf):
            check(
                lambda e=eps, t=targeted: pgd_reference.pgd_step(
                    x_adv, x, grad, norm, e, 0.1, amounts, amounts, *clip, t, active
                )
            )
    check(lambda: pgd_reference.project(x_adv, x, norm, 0.3, amounts, *clip))
    check(lambda: wrm_reference.wrm_step(x_adv, x, grad, 0.3, amounts, 0.5, *clip))
    check(lambda: drawn.random_start(x, norm, 0.3, amounts, *clip, seed))
    if norm == "inf":
        for side in range(2):
            check(lambda s=side: pgd_reference.box(x, 0.3, amounts, *clip)[s])


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1", "L1-exact"])
@pytest.mark.parametrize("clip", [None, (0, 1), (None, 0.5), ([0, 0.25], (1.0, 2)), (-math.inf, 1e300)])
def test_public_steps(norm: str, clip: Any) -> None:
    x_adv, x, grad = (on_device(3, 2, 5, 4) for _ in range(3))
    check(lambda: attacks.pgd_step(x_adv, x, grad, norm=norm, eps=0.3, alpha=0.1, clip=clip))
    check(lambda: attacks.project(x_adv, x, norm=norm, eps=0.3, clip=clip))
    check(lambda: attacks.wrm_step(x_adv, x, grad, eps=0.3, step=0.5, clip=clip))
    check(lambda: attacks.random_start(x, norm=norm, eps=0.3, clip=clip))
