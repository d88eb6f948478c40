"""What is called after every step of an optimizer, whatever kind of object that is."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Handle(Protocol):
    """Ends what it stands for, by ``remove()``."""

    def remove(self) -> None: ...


def parameters_of(optimizer: Any) -> set[int] | None:
    """The ids of the parameters that an optimizer trains; None of an object that does not say."""
    groups = getattr(optimizer, "param_groups", None)
    if groups is None:
        return None
    return {id(p) for group in groups for p in group["params"]}


def after_each_step(optimizer: Any, call: Callable[[], None]) -> Handle:
    """Have ``call`` follow every ``optimizer.step(...)``, whose arguments and result stay as they are."""
    if not callable(getattr(optimizer, "step", None)):
        raise TypeError(f"optimizer is a {type(optimizer).__name__} without a method step; give an optimizer")
    if _calls_hooks(optimizer):
        return optimizer.register_step_post_hook(lambda *_: call())
    return _Wrapped(optimizer, call)


def _calls_hooks(optimizer: Any) -> bool:
    """Whether PyTorch's hooks of steps run: those of Optimizer's constructor, on a ``step`` of the class."""
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        return False
    own = vars(optimizer).get("step")  # a learning-rate scheduler's counts, and calls that of the class
    return getattr(type(optimizer).step, "hooked", False) and (own is None or hasattr(own, "_wrapped_by_lr_sched"))


class _Wrapped:
    """The method ``step`` of one object, with a call after it."""

    def __init__(self, optimizer: Any, call: Callable[[], None]) -> None:
        own, before = vars(optimizer).get("step"), optimizer.step

        @functools.wraps(before)
        def step(this: Any, *args: Any, **kwargs: Any) -> Any:
            if this is not optimizer and own is None and hasattr(type(this), "step"):
                return type(this).step(this, *args, **kwargs)  # a copy steps itself, and has to be attached anew
            result = before(*args, **kwargs)
            if self._active:
                call()
            return result

        self._active = True
        self._optimizer, self._own = optimizer, own
        self._step = types.MethodType(step, optimizer)
        optimizer.step = self._step

    def remove(self) -> None:
        self._active = False  # something else may have wrapped it since
        if vars(self._optimizer).get("step") is self._step:
            if self._own is None:
                del self._optimizer.step
            else:
                self._optimizer.step = self._own
