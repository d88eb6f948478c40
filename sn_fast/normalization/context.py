"""In which context a weight is used: an export, a transform of torch.func, a functional call."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import stateless


def is_exporting() -> bool:
    """Whether torch.export runs the module's own code, outside Dynamo."""
    # On torch 2.7 and 2.9 is_exporting() holds inside plain torch.compile as well.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_wrapped(t: Tensor) -> bool:
    """Whether a tensor is that of a torch.func transform."""
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


_FUNCTIONAL_CALL = stateless._functional_call.__code__


def within_functional_call() -> bool:
    """Whether torch.func.functional_call is under way in this thread; it swaps parameters, so no attribute tells."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _FUNCTIONAL_CALL:
            return True
        frame = frame.f_back
    return False
