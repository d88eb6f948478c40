"""Pickles that hold nothing but arrays, numbers, text and containers of them. No code of the pickle's choice runs."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np


def load_arrays(content: bytes) -> Any:
    """The array, or the dict with arrays, of a pickle of any protocol, also Python 2's.

    Raises:
        pickle.UnpicklingError: it is damaged, or holds anything else.
    """
    try:
        value = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damaged pickles fail in any way
        reason = str(error) if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__} {error}"
        raise pickle.UnpicklingError(" ".join(reason.split())[:200]) from None
    if isinstance(value, dict):  # its own entries; no deeper, as containers may hold one another
        return {key: _array_of(item) for key, item in value.items()}
    return _array_of(value)


class _Unpickler(pickle._Unpickler):
    """Python's own implementation, as the one in C takes gigabytes if a damaged byte says so.

    Callables are made anew each time, so that a pickle that changes one changes nothing else.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")  # the name since NumPy 2
        allowed: dict[tuple[str, str], Callable[[], Any]] = {
            ("numpy", "ndarray"): lambda: "ndarray",  # an argument only
            ("numpy", "dtype"): lambda: lambda code, *_: _Dtype(code),
            ("numpy.core.multiarray", "_reconstruct"): lambda: lambda *_: _Array(),
            ("numpy.core.multiarray", "scalar"): lambda: lambda dtype, raw: _array(dtype, (), raw)[()],
            ("numpy.core.numeric", "_frombuffer"): lambda: (
                lambda raw, dtype, shape, order: _array(dtype, shape, raw, order)
            ),
            # How protocols 0 to 2 of Python 3 write bytes, and bytes of length 0.
            ("_codecs", "encode"): lambda: lambda text, encoding: _latin1(text, encoding),
            ("__builtin__", "bytes"): lambda: lambda: b"",
        }
        make = allowed.get((module, name))
        if make is None:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in it")
        return make()


class _Dtype:
    def __init__(self, code: str | bytes) -> None:
        self.dtype: np.dtype = np.dtype(_text(code))
        if self.dtype.kind not in "uifb":
            raise pickle.UnpicklingError(f"arrays of {self.dtype} are not allowed in it")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if _text(state[1]) == ">":
            self.dtype = self.dtype.newbyteorder(">")


class _Array:
    value: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(dtype, shape, raw, "F" if fortran else "C")


def _array(dtype: _Dtype, shape: tuple[int, ...], raw: bytes, order: Any = "C") -> np.ndarray:
    return np.frombuffer(raw, dtype.dtype).reshape(shape, order=_text(order))  # type: ignore[call-overload]


def _latin1(text: str, encoding: str) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("_codecs.encode is allowed in it for bytes only")
    return text.encode("latin1")


def _text(value: Any) -> str:
    if not isinstance(value, str | bytes):
        raise pickle.UnpicklingError("an array in it is damaged")
    return value.decode("ascii") if isinstance(value, bytes) else value


def _array_of(value: Any) -> Any:
    """The array that a placeholder stood for while the pickle was read."""
    return value.value if isinstance(value, _Array) else value
