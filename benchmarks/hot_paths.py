"""Counts of what the hot paths do, which do not depend on the machine: a guard where times cannot be one.

    python -m benchmarks.hot_paths            # beside the stored ones
    python -m benchmarks.hot_paths --store    # after a change that is meant

Of each path, warm, on one CPU thread:

    operators     of PyTorch, as called from Python or by autograd
    launches      those of them that compute: without compiled kernels each would be a launch or more on a GPU
    allocations   of memory for tensors
    passes        elements that the launches read and write, over those of the path's own tensors (weights or batch)

tests/test_hot_paths.py fails where one grows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import sn_fast
from sn_fast.attacks import pgd, pgd_step, wrm_step
from sn_fast.files import replace_file

STORED = Path(__file__).parent / "results" / "hot_paths.json"
COUNTED = ("operators", "launches", "allocations", "passes")
# Operators that look at memory otherwise, make it, or read a number.
_IDLE_NAMES = """
    alias as_strided chunk contiguous detach detach_ empty empty_like empty_strided expand expand_as flatten is_nonzero
    item lift_fresh narrow new_empty numpy_T permute reshape resize_ resolve_conj resolve_neg select set_ slice split
    split_with_sizes squeeze t to transpose unbind unflatten unsafe_split unsqueeze view view_as _local_scalar_dense
    _reshape_alias _unsafe_view
"""
_IDLE = frozenset(_IDLE_NAMES.split())


class HotPath(NamedTuple):
    """``run`` does it once; ``elements``: of the tensors that it is about."""

    run: Callable[[], object]
    elements: int


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)),
    )


def paths() -> dict[str, HotPath]:
    """Six paths, by name: made and warm."""
    model = sn_fast.apply_spectral_norm(_network(), torch.zeros(1, 3, 16, 16)).train()
    raw = [m.parametrizations.weight.original for m in model if hasattr(m, "parametrizations")]  # type: ignore
    weights = sum(w.numel() for w in raw)
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8)
    start, grad = (x + 0.01 * torch.randn_like(x)).clamp(0, 1), torch.randn_like(x)

    @torch.no_grad()
    def change() -> None:
        for w in raw:
            w.mul_(1.001)

    def refresh() -> None:
        sn_fast.update_spectral_norm(model)

    def unchanged() -> None:
        with torch.no_grad():
            model(x)

    def step() -> None:
        change()
        loss = F.cross_entropy(model(x), y)
        model.zero_grad()
        loss.backward()

    def attack() -> None:
        pgd(model, x, y, norm=2, eps=0.5, steps=3, clip=(0, 1))

    def updates() -> None:
        pgd_step(start, x, grad, norm="inf", eps=0.03, alpha=0.01, clip=(0, 1))
        pgd_step(start, x, grad, norm=2, eps=0.3, alpha=0.1, clip=(0, 1))
        wrm_step(start, x, grad, eps=0.1, step=0.5)

    op = sn_fast.operator_of(nn.Conv2d(8, 8, 3, padding=1, bias=False), (16, 16))
    return {
        "refresh of all norms": HotPath(refresh, weights),
        "forward, weights unchanged": HotPath(unchanged, weights),
        "training step after a change": HotPath(step, weights),
        "attack of 3 steps": HotPath(attack, x.numel()),
        "updates l_inf, l2, wrm": HotPath(updates, x.numel()),
        "certificate of a layer": HotPath(lambda: sn_fast.operator_norm_bound(op, method="fft"), 8 * 8 * 9),
    }


def counted(path: HotPath) -> dict[str, float]:
    """What one run of the path does."""
    with _one_thread():
        for _ in range(2):
            path.run()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            path.run()
        with _Elements() as elements:
            path.run()
    events = recorded.events()
    assert events is not None
    operators = [e.name.removeprefix("aten::") for e in events if _is_outermost(e)]
    results = recorded.profiler.kineto_results.events()
    return {
        "operators": len(operators),
        "launches": sum(name not in _IDLE for name in operators),
        "allocations": sum(e.name() == "[memory]" and e.nbytes() > 0 for e in results),
        "passes": round(elements.count / path.elements, 2),
    }


def _is_outermost(event: Any) -> bool:
    parent = event.cpu_parent
    return event.name.startswith("aten::") and (parent is None or not parent.name.startswith("aten::"))


class _Elements(TorchDispatchMode):
    """Elements that operators read and write; of the library's own operators what is in them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sn_fast":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        result = func(*args, **kwargs)
        if func._schema.name.removeprefix("aten::") not in _IDLE:
            read = {id(t): t.numel() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
            self.count += sum(read.values()) + sum(t.numel() for t in tree_flatten(result)[0] if isinstance(t, Tensor))
        return result


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure() -> dict[str, dict[str, float]]:
    return {name: counted(path) for name, path in paths().items()}


def stored() -> dict[str, Any]:
    """{"torch": version, "paths": {path: {count: number}}}."""
    found: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hot_paths", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", action="store_true", help="let the counts of today be the stored ones")
    options = parser.parse_args(arguments)
    found = measure()
    old = stored()["paths"] if STORED.exists() else {}
    for name, counts in found.items():
        shown = (f"{counts[c]:g} {c}" + _change(counts[c], old.get(name, {}).get(c)) for c in COUNTED)
        print(f"{name + ':':32s}{', '.join(shown)}")
    if options.store:
        content = {"torch": torch.__version__.split("+")[0], "paths": found}
        replace_file(STORED, (json.dumps(content, indent=1) + "\n").encode())


def _change(new: float, old: float | None) -> str:
    return "" if old is None or new == old else f" (was {old:g})"


if __name__ == "__main__":
    main()
