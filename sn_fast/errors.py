"""What ends a command that is not a fault of the program."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_LONGEST_LINE = 1200
_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARY = os.path.dirname(os.path.abspath(os.__file__)) + os.sep


class UserError(Exception):
    """Something the user can put right. The message is one line: which argument, which value, what to do instead.

    Names of arguments stand in backticks, "argument `out`: ...", except in an OptionError; the command line puts its
    options in their place.
    """


class OptionError(UserError):
    """The value of an argument is out of range.

    Attributes:
        name, value, remedy: of the argument, and what to give instead.
    """

    def __init__(self, name: str, value: object, remedy: str) -> None:
        super().__init__(f"{name}={value!r}: {remedy}")
        self.name, self.value, self.remedy = name, value, remedy


def require(module: str, install: str = "'sn_fast[train]'") -> ModuleType:
    """Import a module of an optional dependency, or say how to install it: ``pip install`` ``install``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:  # installed, but broken: its own message says more
            raise
        raise UserError(f"the package {package} is not installed; run: pip install {install}") from error


def first_line(error: BaseException) -> str:
    """An exception as a part of a one-line message."""
    try:
        text = " ".join(str(error).strip().split("\n")[0].split())
    except Exception:  # its own __str__ fails
        text = ""
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def shortened(error: UserError) -> str:
    """The message, without the middle of it if a name in it is endless."""
    text = str(error)
    return text if len(text) <= _LONGEST_LINE else f"{text[: _LONGEST_LINE // 2]} ... {text[-_LONGEST_LINE // 2 :]}"


@contextmanager
def failures_explained(what: str, remedy: str = "") -> Iterator[None]:
    """Code that is not ours can fail in any way, also by sys.exit: say how and where, in one line.

    Raises:
        UserError: ``what``, the failure, the line of the user's code it came from, and ``remedy``. Ctrl-C stays what it
            is.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:
        if lacks_memory(error):
            raise UserError(f"{what}: there is not enough memory ({first_line(error)}){remedy}") from error
        frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_the_users(f.filename)]
        place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        raise UserError(f"{what}: {first_line(error)}{place}{remedy}") from error


def users_stacklevel() -> int:
    """``stacklevel`` for a warning of the caller, so that its place is the user's own line."""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None and not _is_the_users(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return level


def lacks_memory(error: BaseException) -> bool:
    """Whether an allocation failed, or was of a size beyond all memory; PyTorch has several exceptions for it."""
    text = str(error) if isinstance(error, RuntimeError | TypeError | OverflowError | ValueError) else ""
    signs = (
        "allocate memory",
        "enough memory",
        "out of memory",
        "size calculation overflow",
        "overflow when unpacking",
    )
    return isinstance(error, MemoryError) or any(sign in text.lower() for sign in signs)


def _is_the_users(filename: str) -> bool:
    """Whether a line of code is neither of this package nor of an installed one, nor of Python's library."""
    return not (filename.startswith(("<", _PACKAGE, _LIBRARY)) or "site-packages" in filename)
