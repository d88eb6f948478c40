"""Whether a module computes exactly the map that its class in torch.nn stands for."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_base
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_TORCH = os.path.dirname(torch.__file__) + os.sep
# Of nn.Module itself, what a call runs through.
_CALL = {"__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward", "__getattr__", "forward"}
# Overriding these does not change what a layer computes from its weights.
_HARMLESS = {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__repr__", "extra_repr"}
_HARMLESS |= {"reset_parameters", "__constants__", "__firstlineno__", "__static_attributes__", "__setstate__"}
_HARMLESS |= {"__annotate__", "__annotate_func__", "__annotations_cache__", "__dict__", "__weakref__", "_version"}
_HARMLESS |= {"_load_from_state_dict", "_save_to_state_dict", "reset_running_stats"}
_HARMLESS |= {"__init_subclass__", "__class_getitem__", "__new__"}
# These recompute the weight from their own parameters before each call, and leave input and output alone.
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)
# Whose hooks keep the map: our own, and those that gather a sharded weight or distribute inputs and outputs.
_HOMES = ("sn_fast.", "torch.distributed.")

BATCH_STATISTICS = "without running statistics it divides by the deviation of its own input"


def why_not_its_class(
    module: nn.Module, *, hooks: bool = True, statistics: bool = True, known: type[nn.Module] | None = None
) -> str | None:
    """Why a module is not exactly the map of its class in torch.nn, with its weights in use; None if it is.

    Args:
        module: also parametrized, and of a subclass that overrides nothing but its construction and its repr.
        hooks: count forward hooks, own and global ones. statistics: count a normalisation by its input's statistics.
        known: the class whose map it should be; None: the nearest one of torch.nn.
    """
    reason = _own_code(module, known)
    if reason is None and hooks:
        reason = _hook(module)
    if reason is None and statistics and _uses_input_statistics(module):
        reason = BATCH_STATISTICS
    return reason


def leaves_values_alone(hook: Any) -> bool:
    """Whether a forward hook is known to change neither input nor output, and of the weights only those in use."""
    home = getattr(hook, "__module__", None) or ""
    return home.startswith(_HOMES) or isinstance(hook, _WEIGHT_HOOKS)


def computes_weight(hook: Any) -> bool:
    """Whether a forward pre-hook is one of torch.nn.utils that sets the weight: weight_norm, spectral_norm, pruning."""
    return isinstance(hook, _WEIGHT_HOOKS)


def is_parametrized_class(cls: type) -> bool:
    """Whether torch.nn.utils.parametrize made this class: it only adds properties for the weights in use."""
    return cls.__module__ == "torch.nn.utils.parametrize" and cls.__name__.startswith("Parametrized")


def _own_code(module: nn.Module, known: type[nn.Module] | None) -> str | None:
    cls = type(module)
    if known is None:
        known = next((c for c in cls.__mro__ if c.__module__.startswith("torch.nn.modules.")), nn.Module)
    if known is nn.Module:
        return f"{cls.__name__} is not a class of torch.nn"
    for name, owner in _methods(known):
        standard = vars(owner)[name]
        if name in vars(module) and callable(standard):
            return f"its attribute {name!r} replaces the method of {known.__name__}"
        if inspect.getattr_static(cls, name) is not standard:
            return f"{cls.__name__} overrides {name!r} of {known.__name__}"
        if owner.__module__.startswith("torch.") and _is_patched(standard, owner):
            return f"{owner.__name__}.{name} was replaced by other code"
    if inspect.getattr_static(cls, "__getattribute__") is not object.__getattribute__:
        return f"{cls.__name__} overrides '__getattribute__'"
    return None


def _methods(known: type) -> Iterator[tuple[str, type]]:
    """The names that decide what a module of this class computes, and the class that each comes from."""
    seen: set[str] = set()
    for owner in known.__mro__[:-1]:
        names = _CALL & set(vars(owner)) if owner is nn.Module else set(vars(owner)) - _HARMLESS
        yield from ((name, owner) for name in names - seen)
        seen |= names


def _is_patched(method: Any, owner: type) -> bool:
    function = method.__func__ if isinstance(method, (staticmethod, classmethod)) else method
    if not isinstance(function, FunctionType):
        return callable(function) and not isinstance(function, type)
    # torch.fx stands in for two methods while it traces.
    home = function.__module__ or ""
    at_home = home == owner.__module__ or home.startswith("torch.fx.")
    return not (at_home and function.__code__.co_filename.startswith(_TORCH))


def _hook(module: nn.Module) -> str | None:
    pools: list[tuple[str, dict[int, Any]]] = [
        ("a forward hook", module._forward_hooks),
        ("a forward pre-hook", module._forward_pre_hooks),
        ("a global forward hook", module_base._global_forward_hooks),
        ("a global forward pre-hook", module_base._global_forward_pre_hooks),
    ]
    for kind, pool in pools:
        for hook in pool.values():
            if not leaves_values_alone(hook):
                return f"{kind} may change its input or output"
    return None


def _uses_input_statistics(module: nn.Module) -> bool:
    if not isinstance(module, (_BatchNorm, _InstanceNorm)):
        return False
    if module.running_mean is None or module.running_var is None or module.training:
        return True
    return isinstance(module, _InstanceNorm) and not module.track_running_stats
