"""Where the elements of a value come from, for bounds of several values taken together.

The halves of a tensor, taken together, depend on the input no more than the tensor; two unrelated values may add up.
Likewise max(a, b) and min(a, b) together are a and b in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rounding import mul_up, root, root_of_squares


@dataclass(frozen=True)
class Origin:
    """A value whose elements are those of another one, or constants.

    Attributes:
        key: stands for the other value, as it was at that time. bound: of the map from the input to it.
        numbers: of its elements, from 1 on, in the shape of this value; 0 for a constant. Nested as the value is. Of
            a value that is the other one itself, only how many it has.
    """

    key: object
    bound: float
    numbers: Any

    def identity(self) -> object:
        """The same for two values of the same elements in the same order."""
        numbers = self.numbers.cpu().numpy().tobytes() if isinstance(self.numbers, Tensor) else self.numbers
        return self.key, numbers

    def picked(self, picks: Any) -> Origin:
        """The origin of what these numbers pick from this value."""
        if isinstance(self.numbers, int):
            return Origin(self.key, self.bound, picks)
        table = torch.nn.functional.pad(self.numbers.reshape(-1), (1, 0))
        nested = tuple(table[p] for p in picks) if isinstance(picks, tuple) else table[picks]
        return Origin(self.key, self.bound, nested)


@dataclass(frozen=True)
class Twin:
    """One of two values that together are no steeper than ``bound``, such as the larger and the smaller of a and b."""

    key: object
    side: str
    bound: float


@dataclass(frozen=True)
class Piece(Origin):
    """A value, itself, that is linear on either side of a switch.

    Attributes:
        switch: the same for those of one switch. forms: what it is on either side. joint: bounds several such values
            taken together, by their forms.
    """

    switch: object
    forms: Any
    joint: Callable[[Sequence[Any]], float]


def most_copies(numbers: Iterable[Tensor | int]) -> int:
    """How often the most copied element occurs."""
    parts = list(numbers)
    device = next((p.device for p in parts if isinstance(p, Tensor)), None)
    flat = [torch.arange(1, p + 1, device=device) if isinstance(p, int) else p.reshape(-1) for p in parts]
    counts = torch.bincount(torch.cat(flat), minlength=2)[1:]  # 0 is a constant
    return int(counts.max())


def joint_bound(bounds: Sequence[float], origins: Sequence[Any]) -> float:
    """The bound of several values taken together."""
    alone: list[float] = []
    twins: dict[object, dict[str, Twin]] = {}
    families: dict[object, list[tuple[float, Origin]]] = {}
    switched: dict[object, list[tuple[float, Piece]]] = {}
    for bound, origin in zip(bounds, origins):
        if isinstance(origin, Twin) and origin.side not in twins.get(origin.key, {}):
            twins.setdefault(origin.key, {})[origin.side] = origin
            twins[origin.key][origin.side + " alone"] = Twin(None, "", bound)
        elif isinstance(origin, Piece):
            switched.setdefault(origin.switch, []).append((bound, origin))
        elif isinstance(origin, Origin) and isinstance(origin.numbers, (Tensor, int)):
            families.setdefault(origin.key, []).append((bound, origin))
        else:
            alone.append(bound)
    for pair in twins.values():
        apart = [t.bound for side, t in pair.items() if side.endswith(" alone")]
        together = next(t.bound for side, t in pair.items() if not side.endswith(" alone"))
        apart_bound = root_of_squares(apart)
        alone.append(min(apart_bound, together) if len(apart) == 2 else apart_bound)
    for members in families.values():
        apart_bound = root_of_squares(bound for bound, _ in members)
        origin = members[0][1]
        together = mul_up(root(most_copies(o.numbers for _, o in members)), origin.bound)
        alone.append(min(apart_bound, together) if len(members) > 1 else apart_bound)
    for pieces in switched.values():
        apart_bound = root_of_squares(bound for bound, _ in pieces)
        alone.append(min(apart_bound, pieces[0][1].joint([p.forms for _, p in pieces])))
    return root_of_squares(alone)
