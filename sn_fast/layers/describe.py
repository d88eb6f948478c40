"""Layers, sizes and tables as people read them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from decimal import Context
from html import escape
from typing import Any

_DIGITS = 6


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


def rounded(value: float, direction: str) -> str:
    """``value`` to six digits, towards ``direction``: a rounding mode of decimal, e.g. ROUND_CEILING for a bound."""
    return f"{Context(prec=_DIGITS, rounding=direction).create_decimal_from_float(value):g}"


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Rows of a table as lines; the columns in ``right`` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(cells).rstrip())
    return lines


def html_table(rows: Sequence[Sequence[str]], right: Collection[int] = (), note: str = "") -> str:
    """Rows of a table, the first its head, as HTML; columns in ``right`` to the right, ``note`` a line below."""

    def cells(row: Sequence[str], tag: str) -> str:
        sides = ("right" if i in right else "left" for i in range(len(row)))
        return "".join(f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, row))

    head, *body = rows
    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in body)
    below = f"<p>{escape(note)}</p>" if note else ""
    return f"<table><thead><tr>{cells(head, 'th')}</tr></thead><tbody>{lines}</tbody></table>{below}"
