"""Arithmetic on bounds: float64, every result rounded up, so that a product of bounds stays a bound."""

from __future__ import annotations

import math
from collections.abc import Iterable

# Relative error allowed for a few float64 operations in a row, or for a dense singular value (a few ulp are likely).
_SLACK = 1e-12


def next_up(x: float) -> float:
    """The next float64 above ``x``; 0 and infinity stay."""
    return math.nextafter(x, math.inf) if 0 < x < math.inf else x


def loosened(x: float) -> float:
    """``x`` with room for the rounding of a short float64 computation that ends in it."""
    return x * (1 + _SLACK)


def mul_up(a: float, b: float) -> float:
    """a * b from above. A zero map is constant whatever comes before it, so 0 * inf = 0."""
    if a == 0 or b == 0:
        return 0.0
    if a == 1 or b == 1:
        return a * b
    return next_up(a * b)


def plus(values: Iterable[float]) -> float:
    """Sum from above."""
    total = 0.0
    for value in values:
        total = next_up(total + value) if total and value else total + value
    return total


def root_of_squares(values: Iterable[float]) -> float:
    """sqrt(sum of squares) from above."""
    positive = [v for v in values if v]
    if len(positive) <= 1:
        return sum(positive)
    return loosened(math.hypot(*positive))


def root(n: float) -> float:
    """sqrt(n) from above, exact for squares."""
    r = math.sqrt(n)
    return r if r * r == n and r.is_integer() else next_up(r)
