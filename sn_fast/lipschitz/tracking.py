"""The bounds of the values of a graph as it runs: also where one value is written into another's memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from .binding import name_of
from .origins import Origin, Twin, joint_bound, most_copies
from .rounding import mul_up, root
from .rules import Call, Outcome, leaves

_SIDES = {"max": "upper", "maximum": "upper", "fmax": "upper", "amax": "upper"}
_SIDES |= {"min": "lower", "minimum": "lower", "fmin": "lower", "amin": "lower"}
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "ifloordiv", "imod", "setitem", "delitem"}


class Tracking:
    """Bound and origin of each value, by its node in the graph.

    Attributes:
        bounds: of the map from the network's input to the value.
        changed_state: whether what depends on the input was written into a tensor that the model keeps.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bounds: dict[fx.Node, float] = {}
        self.changed_state = False
        self._origins: dict[fx.Node, Any] = {}
        self._keys: dict[fx.Node, object] = {}
        self._state = set(_storages((*model.parameters(), *model.buffers())))

    def is_state(self, value: Any) -> None:
        """This value is kept between calls of the model."""
        self._state.update(_storages(tensors(value)))

    def origin(self, n: fx.Node, value: Any) -> Any:
        """Where the elements of a node's value come from: from the value itself, if no more is known."""
        if n in self._origins:
            return self._origins[n]
        if self.bounds[n] and isinstance(value, Tensor):
            return Origin(self._keys.setdefault(n, object()), self.bounds[n], value.numel())
        return None

    def comes_from(self, n: fx.Node, origin: Origin) -> None:
        """Remember where the elements of a node's value come from, unless it is known."""
        self._origins.setdefault(n, origin)

    def follow(self, n: fx.Node, call: Call, outcome: Outcome) -> float:
        """Remember where the elements of a call's result come from. Returns its bound, with that taken into account."""
        source = call.origin("input")
        name = None if call.module is not None else name_of(call.target)
        if outcome.picks is not None and isinstance(source, Origin) and isinstance(source.numbers, (int, Tensor)):
            origin = source.picked(outcome.picks)
            self._origins[n] = origin
            return min(outcome.bound, mul_up(root(most_copies(leaves(origin.numbers))), origin.bound))
        if outcome.picks is not None and isinstance(source, Twin) and isinstance(outcome.picks, Tensor):
            if most_copies([outcome.picks]) <= 1:
                self._origins[n] = source
        elif name in ("getitem", "getattr") and isinstance(call.x, tuple):
            self._element(n, source, call.get("index", None) if name == "getitem" else call.get("name"))
        elif name in _SIDES and math.isfinite(outcome.bound):
            self._twin(n, call, _SIDES[name])
        return outcome.bound

    def spread(self, n: fx.Node, value: Any, written: list[Tensor], env: dict[fx.Node, Any]) -> list[fx.Node]:
        """Give every other name of a tensor that was overwritten the bound of what is in it now.

        Returns:
            The values of which only a part was overwritten, or another one: they have no bound any more.
        """
        lost = []
        results = [_place(t) for t in tensors(value)]
        for t in written:
            (storage,) = _storages([t]) or (0,)
            self.changed_state |= bool(self.bounds[n]) and storage in self._state
            for other, held in env.items():
                if storage not in _storages(tensors(held)):
                    continue
                self._origins.pop(other, None)
                self._keys.pop(other, None)
                if isinstance(held, Tensor) and _place(held) == _place(t) and _place(t) in results:
                    self.bounds[other] = self.bounds[n]
                elif self.bounds[n] or self.bounds[other]:
                    self.bounds[other] = math.inf
                    lost.append(other)
        if written:
            self._origins.pop(n, None)
        order = {m: i for i, m in enumerate(n.graph.nodes)} if lost else {}
        return [other for other in lost if any(order[user] > order[n] for user in other.users)]

    def _element(self, n: fx.Node, source: Any, which: Any) -> None:
        if isinstance(source, Twin) and which in (0, "values"):
            self._origins[n] = source
        if isinstance(source, Origin) and isinstance(source.numbers, tuple) and isinstance(which, int):
            self._origins[n] = Origin(source.key, source.bound, source.numbers[which])

    def _twin(self, n: fx.Node, call: Call, side: str) -> None:
        """The larger and the smaller of two values are those two in another order; of a set, two of its elements."""
        assert call.slots is not None
        x, source = call.get("input"), call.origin("input")
        if not isinstance(source, Origin) or isinstance(source.numbers, tuple):
            return
        if "other" in call.slots and isinstance(call.get("other"), Tensor):
            other = call.origin("other")
            if isinstance(other, Origin) and x.shape == call.get("other").shape == call.out.shape:
                two = frozenset((source.identity(), other.identity()))
                bounds = [call.bound("input"), call.bound("other")]
                self._origins[n] = Twin(("of two", two), side, joint_bound(bounds, [source, other]))
        elif isinstance(dim := call.get("dim", None), int) and x.shape[dim] > 1:
            key = ("of a set", source.identity(), tuple(x.shape), dim % x.ndim)
            self._origins[n] = Twin(key, side, call.bound("input"))


def writes_in_place(n: fx.Node, module: nn.Module | None) -> bool:
    """Whether a call may overwrite its arguments."""
    if module is not None:
        return bool(getattr(module, "inplace", False))
    if n.op not in ("call_function", "call_method"):
        return False
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    flagged = n.kwargs.get("inplace") or n.kwargs.get("out") is not None or any(a is True for a in n.args)
    return bool(flagged) or name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def tensors(nested: Any) -> Iterator[Tensor]:
    """The tensors in nested containers."""
    return (leaf for leaf in leaves(nested) if isinstance(leaf, Tensor))


def copied(args: Any) -> Any:
    """The arguments, tensors copied: the model may write in place."""
    return fx.node.map_aggregate(args, lambda a: a.detach().clone() if isinstance(a, Tensor) else a)


def _storages(some: Any) -> list[int]:
    # Sparse tensors have none; no rule writes into them.
    return [p for t in some if t.layout is torch.strided and (p := t.untyped_storage().data_ptr())]


def _place(t: Tensor) -> tuple[Any, ...]:
    return t.data_ptr(), tuple(t.shape), t.stride()
