"""The tests of operators, layers and attacks with their tensors on another device: SN_FAST_TEST_DEVICE=cuda pytest.

A test makes its tensors as if there were only the CPU, with the same random numbers everywhere, and they are moved as
they are made. What sn_fast itself makes is left alone: code that forgets a device fails here as it does for a user.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _pytest
import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

DEVICE = torch.device(os.environ.get("SN_FAST_TEST_DEVICE") or "cpu")

_HERE = Path(__file__).parent
MOVED = ("attacks", "kernels", "layers", "lipschitz", "normalization", "norms", "theory")
"""Folders of the tests whose tensors are moved."""

_MOVED = tuple(str(_HERE / folder) + os.sep for folder in MOVED)
_TORCH = str(Path(torch.__file__).parent) + os.sep
_PYTEST = str(Path(_pytest.__file__).parent) + os.sep
# What these do is their caller's: a layer's parameters, methods written in Python, approx, arrays read for a test.
_HELPERS = (f"{_TORCH}nn{os.sep}", f"{_TORCH}_tensor.py", f"{_TORCH}overrides.py", _PYTEST, str(_HERE / "published.py"))
_MAKERS = {
    *(torch.arange, torch.as_tensor, torch.empty, torch.empty_strided, torch.eye, torch.full),
    *(torch.linspace, torch.logspace, torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm),
    *(torch.scalar_tensor, torch.tensor, torch.zeros),
}
_EMPTY = {torch.empty, torch.empty_strided}
_MAKERS_LIKE = {torch.rand_like, torch.randint_like, torch.randn_like}
_DRAWS = {
    *(Tensor.bernoulli_, Tensor.exponential_, Tensor.normal_, Tensor.random_, Tensor.uniform_),
    *(nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_),  # a mode sees these whole, and not what they call
}
_TO_NUMPY: set[Any] = {Tensor.numpy, Tensor.__array__}


class OnDevice(TorchFunctionMode):
    """Moves what the tests make."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func in _MAKERS and kwargs.get("device") is None and _by_a_test():
            if func in _EMPTY:  # moved, memory with holes would lose them
                return func(*args, **{**kwargs, "device": DEVICE})
            wanted = kwargs.pop("requires_grad", False)
            made = func(*args, **kwargs).to(DEVICE)
            return made.requires_grad_() if wanted else made
        if func in _MAKERS_LIKE and _by_a_test():
            return func(torch.empty_like(args[0], device="cpu"), *args[1:], **kwargs).to(args[0].device)
        if func in _DRAWS and _by_a_test():
            target, rest = (args[0], args[1:]) if args else (kwargs.pop("tensor"), ())
            generator = kwargs.get("generator")
            source = torch.empty_like(target, device="cpu" if generator is None else generator.device)
            with torch.no_grad():
                return target.copy_(func(source, *rest, **kwargs))
        if func in _TO_NUMPY and args[0].device.type != "cpu" and _by_a_test():
            args = (args[0].cpu(), *args[1:])
        return func(*args, **kwargs)


def _by_a_test() -> bool:
    """Whether the call comes from a test's own code, or from a layer's constructor that a test calls."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith(_HELPERS):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith(_MOVED)


_cpu_from_numpy = torch.from_numpy


def _from_numpy(array: np.ndarray) -> Tensor:
    made = _cpu_from_numpy(array)
    return made.to(DEVICE) if _by_a_test() else made


def activate() -> None:
    """To the end of the process, if SN_FAST_TEST_DEVICE is set."""
    if "SN_FAST_TEST_DEVICE" in os.environ:
        torch.backends.cudnn.allow_tf32 = False  # the tests' bounds are those of float32
        torch.backends.cudnn.deterministic = True  # and many compare bits
        torch.from_numpy = _from_numpy  # type: ignore[assignment]  # the one maker that no mode sees
        OnDevice().__enter__()
