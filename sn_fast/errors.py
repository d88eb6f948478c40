"""What ends a command that is not a fault of the program."""

from __future__ import annotations

import importlib
from types import ModuleType


class UserError(Exception):
    """Something the user can put right. The message is one line: which argument, which value, what to do instead."""


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
    text = " ".join(str(error).split("\n")[0].split())
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__
