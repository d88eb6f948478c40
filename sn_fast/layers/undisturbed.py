"""Running a module without leaving anything behind in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_REGISTERED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """No gradients, no autocast, no random numbers drawn; attributes, parameters and buffers come back as they were."""
    modules = list(module.modules())
    attributes = [dict(vars(m)) for m in modules]
    registered = [{name: vars(m)[name].copy() for name in _REGISTERED} for m in modules]
    tensors = _tensors(modules)
    values = [(t, t._version, t.detach().clone()) for t in tensors]
    gpus = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    kind = next((t.device.type for t in tensors if not t.is_meta), "cpu")
    with torch.random.fork_rng(devices=gpus), torch.inference_mode(False), torch.autocast(kind, enabled=False):
        try:
            yield
        finally:
            for m, plain, dicts in zip(modules, attributes, registered):
                vars(m).clear()
                vars(m).update(plain)
                for name, content in dicts.items():
                    _refill(vars(m)[name], content)
            with torch.no_grad():
                for t, version, value in values:
                    if t._version != version:
                        t.copy_(value)


def _tensors(modules: list[nn.Module]) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    for m in modules:
        held = (*m._parameters.values(), *m._buffers.values(), *vars(m).values())
        found.update({id(t): t for t in held if isinstance(t, Tensor) and not t.is_inference()})
    return list(found.values())


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, set):
        same = container == content
    else:
        same = len(container) == len(content) and all(
            a is b and v is w for (a, v), (b, w) in zip(container.items(), content.items())
        )
    if not same:
        container.clear()
        container.update(content)
