"""The types of a run's options: Python's own numbers, texts and tuples, as a file holds them and gives them back."""

from __future__ import annotations

import operator
import os
from numbers import Real
from typing import Any

import numpy as np

from ...errors import OptionError


def plain(name: str, annotation: str, value: Any) -> Any:
    """``value`` in the type that its option is annotated with: "int", "float | None", "tuple[int, ...] | None", ...

    A whole number becomes a float where that is the type, so that 2 and 2.0 are one option. A number that would have to
    be rounded, and a text in place of a number, are refused.

    Raises:
        OptionError: it is of another type.
    """
    kind = annotation.removesuffix(" | None")
    if value is None and kind != annotation:
        return None
    convert, remedy = _KINDS.get(kind, (_text, "must be a text"))
    try:
        return convert(value)
    except (TypeError, ValueError):
        raise OptionError(name, value, remedy) from None


def _integer(value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise TypeError
    return operator.index(value)


def _number(value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise TypeError
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)


def _text(value: Any) -> str:
    text = os.fspath(value)
    if not isinstance(text, str):
        raise TypeError
    return text


def _integers(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        raise TypeError
    return tuple(_integer(item) for item in value)


_KINDS = {
    "int": (_integer, "must be an integer"),
    "float": (_number, "must be a number"),
    "bool": (_flag, "must be True or False"),
    "tuple[int, ...]": (_integers, "must be integers"),
}
