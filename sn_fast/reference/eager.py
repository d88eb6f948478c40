"""Whether nothing watches, transforms or differentiates a computation, so that its numbers may be read on the way."""

from __future__ import annotations

import torch
from torch import Tensor

_PLAIN = (Tensor, torch.nn.Parameter)


def is_watched(*tensors: Tensor) -> bool:
    """Whether the dispatcher must hear of a call: of modes, traces, transforms, and tensors that are more than that."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return True
    for t in tensors:  # noqa: SIM110 - a generator costs more than what it asks
        if type(t) not in _PLAIN or t.is_meta:
            return True
    return False


def is_readable(*tensors: Tensor) -> bool:
    """Whether the host may read numbers on its way, to leave out what they make superfluous."""
    if is_watched(*tensors):
        return False
    differentiates = torch.is_grad_enabled()
    for t in tensors:  # noqa: SIM110
        if not t.is_cpu or (differentiates and t.requires_grad):
            return False
    return True
