"""Forward hooks that a layer was given by others: whether they only look on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..layers.exact import leaves_values_alone
from .rules import leaves

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


class _Watch(TorchDispatchMode):
    """Notices numbers read from tensors, on which code may depend, and writes into the tensors that it watches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.paused = False
        self.watched: set[int] = set()

    def watch(self, nested: Any) -> None:
        self.watched.update(t.untyped_storage().data_ptr() for t in leaves(nested) if isinstance(t, Tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.paused:
            self.seen |= func in _READS
            if func._schema.is_mutable:
                tensors = [t for t in leaves([args, kwargs or {}]) if isinstance(t, Tensor)]
                self.seen |= any(t.untyped_storage().data_ptr() in self.watched for t in tensors)
        return func(*args, **(kwargs or {}))


def observed_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, bool]:
    """The result of a call of the module, and whether its hooks may change input, output or weights.

    They do if its forward is not given the caller's own tensors with their values, or if the caller is not given those
    that it returned. They may if they read numbers, or write into these tensors.
    """
    given = _snapshot((args, kwargs))
    weights = [p.detach().clone() for p in module.parameters()]
    forward = module.forward
    watch = _Watch()
    watch.watch([args, kwargs])
    seen: list[list[tuple[Any, ...]]] = []

    def watched(*inner_args: Any, **inner_kwargs: Any) -> Any:
        seen.append(_snapshot((inner_args, inner_kwargs)))
        watch.paused = True
        result = forward(*inner_args, **inner_kwargs)
        watch.watch(result)
        watch.paused = False
        seen.append(_snapshot(result))
        return result

    module.forward = watched
    try:
        with watch:
            out = module(*args, **kwargs)
    finally:
        del module.forward
    kept = all(torch.equal(a, b) for a, b in zip(weights, module.parameters()))
    same = len(seen) == 2 and kept and _same(given, seen[0]) and _same(seen[1], _snapshot(out))
    return out, watch.seen or not same


@contextmanager
def silent(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Hooks of others that only look on are not called meanwhile."""
    pools = [pool for m in modules for pool in (m._forward_hooks, m._forward_pre_hooks)]
    before = [dict(pool) for pool in pools]
    try:
        for pool in pools:
            for key in [k for k, hook in pool.items() if not leaves_values_alone(hook)]:
                del pool[key]
        yield
    finally:
        for pool, entries in zip(pools, before):
            pool.clear()
            pool.update(entries)


def _snapshot(nested: Any) -> list[tuple[Any, ...]]:
    """Each leaf itself, and for a tensor its version and its values."""
    return [
        (leaf, leaf._version, leaf.detach().clone()) if isinstance(leaf, Tensor) else (leaf, 0, None)
        for leaf in leaves(nested)
    ]


def _same(before: list[tuple[Any, ...]], after: list[tuple[Any, ...]]) -> bool:
    return len(before) == len(after) and all(
        a is b and v == w and (x is None or torch.equal(x.nan_to_num(), y.nan_to_num()))
        for (a, v, x), (b, w, y) in zip(before, after)
    )
