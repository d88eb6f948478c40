"""Layers and sizes as people write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def times(sizes: Sequence[int]) -> str:
    """E.g. ``"32x32"``."""
    return "x".join(map(str, sizes))


def window(module: Any) -> str:
    """Kernel of a convolution, and what is not 1 of stride, dilation and groups: e.g. ``"3x3 s2 g32"``.

    Empty for a layer that is described otherwise.
    """
    if not all(hasattr(module, name) for name in ("kernel_size", "stride", "dilation", "groups")):
        return ""
    parts = [times(module.kernel_size)]
    for letter, values in (("s", module.stride), ("d", module.dilation), ("g", (module.groups,))):
        if any(value != 1 for value in values):
            parts.append(letter + (str(values[0]) if len(set(values)) == 1 else times(values)))
    return " ".join(parts)


def aligned(rows: Sequence[Sequence[str]], right: frozenset[int] = frozenset()) -> list[str]:
    """Rows of a table as lines; the columns in ``right`` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines
