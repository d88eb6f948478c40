"""One parametrized class for all normalised layers of a class.

torch.nn.utils.parametrize gives every module that it parametrizes a class of its own. torch.compile tells modules apart
by their class, so of twelve equal blocks each would be compiled anew, until its limit. Here they share a class.

torch sets and deletes properties of such a class for one module. So here a property stays, and what it gives follows
from the module: the parametrized tensor where the module has such a parametrization, else the plain one.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layers.linear import chain
from ..layers.weighted import is_dtensor


class _Shared(type):
    """Of the classes that several modules share."""

    def __setattr__(cls, name: str, value: object) -> None:
        if isinstance(value, property) and value.fget is not None and value.fget.__module__ == parametrize.__name__:
            value = _tensor(name)  # torch's own would be that of one module
        super().__setattr__(name, value)

    def __delattr__(cls, name: str) -> None:
        if not isinstance(getattr(cls, name, None), _Property):
            super().__delattr__(name)


class _Property(property):
    """A tensor that modules of a class may have parametrized."""


# By the class before parametrizations; a class goes with the last module of it.
_classes: weakref.WeakValueDictionary[type, type] = weakref.WeakValueDictionary()


def share_class(module: nn.Module, name: str) -> None:
    """Have a module, whose tensor ``name`` is its only parametrized one, share its class with others of its kind."""
    private = type(module)
    original = private.__bases__[0]
    shared = _classes.get(original)
    if shared is None:
        kept = {k: v for k, v in vars(private).items() if k not in (name, "__dict__", "__weakref__")}
        kept["register_parameter"] = _register_parameter
        metaclass = _Shared if type(original) is type else type("_Shared", (_Shared, type(original)), {})
        shared = _classes[original] = metaclass(private.__name__, (original,), kept)
    if not isinstance(vars(shared).get(name), _Property):
        setattr(shared, name, _tensor(name))
    module.__class__ = shared


def _register_parameter(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
    """Of nn.Module, with the remedies where a parameter is put, or distributed, after the normalisation."""
    lists: Any = module._modules.get("parametrizations")
    if is_dtensor(param) and lists is not None and (name in lists._modules or name.startswith("parametrizations.")):
        raise RuntimeError(
            f"{type(module).__name__} is normalised already, and parallelize_module distributes plain layers alone: "
            "call it first, and sn_fast.apply_spectral_norm(model, example_input) then"
        )
    if param is not None and lists is not None and name in lists._modules:
        raise KeyError(
            f"attribute {name!r} already exists: {type(module).__name__} makes it from "
            f"parametrizations.{name}.original; assign the nn.Parameter to that, or a tensor to {name!r}"
        )
    nn.Module.register_parameter(module, name, param)


def _tensor(name: str) -> _Property:
    def get(module: nn.Module) -> Any:
        lists: Any = module._modules.get("parametrizations")
        if lists is None or name not in lists._modules:
            return _plain(module, name)
        if torch.jit.is_scripting():
            raise RuntimeError("Parametrization is not working with scripting.")
        if parametrize._cache_enabled:
            return _cached(module, name)
        return lists._modules[name]()

    def put(module: nn.Module, value: Tensor) -> None:
        lists: Any = module._modules.get("parametrizations")
        if lists is None or name not in lists._modules:
            module.__dict__[name] = value
        else:
            lists._modules[name].right_inverse(value)

    def remove(module: nn.Module) -> None:
        if name not in module.__dict__:
            raise AttributeError(f"{name!r} of {type(module).__name__} cannot be deleted")
        del module.__dict__[name]

    return _Property(get, put, remove)


def _plain(module: nn.Module, name: str) -> Any:
    """What a module without this property would have."""
    for place in (module._parameters, module.__dict__):
        if name in place:
            return place[name]
    return nn.Module.__getattr__(module, name)  # of a module's class with its own, Python asks that next


def _cached(module: nn.Module, name: str) -> Tensor:
    """Within torch.nn.utils.parametrize.cached(), a weight is computed once."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("Cannot trace a model while caching parametrizations.")
    key = id(module), name
    found = parametrize._cache.get(key)
    if found is None:
        found = parametrize._cache[key] = chain(module, name)()
    return found
