"""No normalised copy of a gathered weight outlives its layer's forward: the backward makes it again.

FSDP frees the gathered weight after the forward and gathers it anew for the backward. The layer's operation keeps the
normalised weight for the backward; kept as it is, it would hold as much memory as if nothing had been freed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class _Kept(NamedTuple):
    """In place of a normalised weight, or a view of it: how to make it again."""

    make: Callable[[], Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class _Forward(saved_tensors_hooks):
    """The forward of one layer, with the normalised weights that it has made, by the address of their memory.

    They are held until it ends, so that no other tensor takes the address.
    """

    def __init__(self) -> None:
        self.made: dict[int | None, tuple[Tensor, int, Callable[[], Tensor]]] = {}  # with the weight's version
        super().__init__(self._pack, _unpack)

    def _pack(self, t: Tensor) -> Any:
        found = self.made.get(_address(t))
        if found is None:
            return t
        weight, version, make = found
        if t.dtype != weight.dtype or t.is_neg() or t._version != version:  # a complex view, say, or written in place
            return t
        return _Kept(make, t.size(), t.stride(), t.storage_offset())


def _address(t: Tensor) -> int | None:
    return t.untyped_storage().data_ptr() if type(t) is Tensor and t.numel() else None


def _unpack(packed: Any) -> Tensor:
    if not isinstance(packed, _Kept):
        found: Tensor = packed
        return found
    with torch.no_grad():
        return packed.make().as_strided(packed.size, packed.stride, packed.offset)


class _Threads(threading.local):
    def __init__(self) -> None:
        self.forwards: list[_Forward | None] = []


_threads = _Threads()


def note_made(weight: Tensor, make: Callable[[], Tensor]) -> None:
    """``weight`` is a normalised weight that ``make()`` can make again, from the one gathered by then."""
    forwards = _threads.forwards
    if forwards and forwards[-1] is not None and weight.numel():
        forwards[-1].made[_address(weight)] = weight, weight._version, make


def keep_no_copies(module: nn.Module) -> None:
    """Have the forwards of a layer keep none of its normalised weights for the backward."""
    if enter not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=True)


def enter(module: nn.Module, args: Any) -> None:
    forward = None
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _others_save():
        forward = _Forward()
        forward.__enter__()
    _threads.forwards.append(forward)


def leave(module: nn.Module, args: Any, output: Any) -> None:
    forward = _threads.forwards.pop() if _threads.forwards else None
    if forward is not None:
        forward.__exit__(None, None, None)
        forward.made.clear()


def _others_save() -> bool:
    """Whether activation checkpointing, say, decides what is saved: of several hooks only the innermost act."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(False) is not None
