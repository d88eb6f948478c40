"""PyTorch's own spectral norms taken off layers, so that ours come in their place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook

from ..layers.linear import chain
from .parametrization import SpectralNorm


class Vectors(NamedTuple):
    """The singular vectors that PyTorch's spectral norm held: of the weight as a matrix with rows ``dim``."""

    u: Tensor
    v: Tensor
    dim: int

    def hand_over(self, parametrization: SpectralNorm) -> None:
        """Give them to ours if it iterates the same matrix; as from a checkpoint, they stay if they fit the weight."""
        if parametrization.matrix_dim == self.dim:
            parametrization.load_state_dict({"_u": self.u, "_v": self.v})


@contextmanager
def replaced(modules: Iterable[nn.Module], name: str) -> Iterator[dict[nn.Module, Vectors]]:
    """Take PyTorch's spectral norm, of either kind, off these modules; they keep the raw weight, the same Parameter.

    Yields the vectors of those that had one. If the body fails, the modules are as they were.
    """
    before: list[_Before] = []
    vectors: dict[nn.Module, Vectors] = {}
    try:
        for module in modules:
            found = _hook_of(module, name) or _parametrization_of(module, name)
            if found is not None:
                before.append(_Before(module))
                vectors[module] = _taken_off(module, name, found)
        yield vectors
    except BaseException:
        for state in before:
            state.restore()
        raise


def _hook_of(module: nn.Module, name: str) -> SpectralNormHook | None:
    hooks = module._forward_pre_hooks.values()
    return next((h for h in hooks if isinstance(h, SpectralNormHook) and h.name == name), None)


def _parametrization_of(module: nn.Module, name: str) -> nn.Module | None:
    """PyTorch's parametrization, where it is the last one of the weight, which can be taken off alone."""
    last = chain(module, name)[-1] if parametrize.is_parametrized(module, name) else None
    return last if isinstance(last, parametrizations._SpectralNorm) else None


def _taken_off(module: nn.Module, name: str, found: Any) -> Vectors:
    if isinstance(found, SpectralNormHook):
        raw = module._parameters[f"{name}_orig"]
        u, v = (module._buffers[f"{name}_{key}"] for key in ("u", "v"))
        nn.utils.remove_spectral_norm(module, name)
        loading = module._load_state_dict_pre_hooks  # PyTorch leaves its own there, wrapped
        for key in [k for k, h in loading.items() if getattr(getattr(h, "hook", h), "fn", None) is found]:
            del loading[key]
        module._parameters[name] = raw
    else:
        u, v = (found._buffers.get(key) for key in ("_u", "_v"))
        if len(chain(module, name)) > 1:
            chain(module, name).pop(-1)
        else:
            own_class(module)
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    nothing = torch.empty(0)  # PyTorch keeps no vectors of a 1-D weight
    return Vectors(nothing if u is None else u, nothing if v is None else v, found.dim)


class _Before:
    """A module as it was, down to the containers that handles of hooks refer to."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls = module, type(module)
        self.parts = [module, *_parametrization_lists(module)]
        self.attributes = [dict(part.__dict__) for part in self.parts]
        self.contents = [{k: copy.copy(v) for k, v in a.items() if isinstance(v, dict | set)} for a in self.attributes]

    def restore(self) -> None:
        self.module.__class__ = self.cls
        for part, attributes, contents in zip(self.parts, self.attributes, self.contents, strict=True):
            part.__dict__.clear()
            part.__dict__.update(attributes)
            for key, content in contents.items():
                attributes[key].clear()
                attributes[key].update(content)


def _parametrization_lists(module: nn.Module) -> list[nn.Module]:
    held = module._modules.get("parametrizations")
    return [] if held is None else [held, *held.children()]


def own_class(module: nn.Module) -> None:
    """Give the module a class of its own: torch removes a property from the class, which deep copies share."""
    shared = type(module)
    namespace = {k: v for k, v in vars(shared).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, namespace)
