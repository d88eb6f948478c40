"""Classes that a checkpoint may hold beside tensors: what it holds, and what the user allows.

torch.load(weights_only=True) makes objects of no other classes, since a file decides what is called to make them.
"""

from __future__ import annotations

import builtins
import importlib
import re
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError, failures_explained

_RENAMED = (("numpy.core", "numpy._core"), ("numpy._core", "numpy.core"), ("pathlib._local", "pathlib"))
_PROGRAMS = re.compile(  # modules whose classes and functions start programs or run code
    r"(asyncio|bdb|code|codeop|commands|ctypes|importlib|multiprocessing|nt|os|pdb|posix|pty|runpy|shutil|socket|"
    r"subprocess|sys|timeit|webbrowser)\b"
)
_SHOWN = 12


class _Dict(OrderedDict[Any, Any]):
    """Stands for classes derived from dict, which torch.load does not fill even if they are allowed."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


_DICTS = (dict, OrderedDict, Counter)


@contextmanager
def allowed(names: Collection[str]) -> Iterator[None]:
    """Within this context torch.load makes objects of these classes too.

    Args:
        names: module.Class, as the file has it; or NAME=module.Class where the class is elsewhere than in the file.

    Raises:
        UserError: a name is none of an importable class.
    """
    entries: list[Any] = []
    for name in names:
        stored, _, here = name.partition("=")
        found = _found(stored, here or stored)
        is_dict = isinstance(found, type) and issubclass(found, dict) and found not in _DICTS
        entries.append((_Dict if is_dict else found, stored))
    if any(entry is np.dtype for entry, _ in entries):  # whose instances are of a class per type
        types = {type(np.dtype(code)) for code in np.typecodes["All"]}
        entries += [(found, f"{found.__module__}.{found.__qualname__}") for found in types]
    with torch.serialization.safe_globals(entries):
        yield


def blocked(path: Path, error: BaseException, names: Collection[str]) -> str:
    """Why torch.load refused the file: what it holds and the options that allow it; empty: it has other reasons."""
    found = _unknown_classes(path, error, {name.partition("=")[0] for name in names})
    if not found:
        return ""
    unsafe = [name for name in found if _runs_programs(name)]
    if unsafe:
        return (
            f"{path} calls {_few(unsafe)} when it is loaded, which could run any program, and is never loaded: "
            "save model.state_dict() in place of what it holds"
        )
    return (
        f"{path} holds more than tensors and numbers, {_few(found)}, and loading that could run any program: if you "
        f"trust the file, add {' '.join(f'`allow_classes` {name}' for name in found[:_SHOWN])}; or save "
        "model.state_dict() in place of the model and all else"
    )


def _unknown_classes(path: Path, error: BaseException, names: Collection[str]) -> list[str]:
    try:
        known = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) - set(names))
    except Exception:  # a form that it does not read, e.g. that of before torch 1.6: then one name at a time
        known = []
    named = re.search(r"GLOBAL (\S+) w", str(error)) or re.search(r"but got <class '([^']+)'>", str(error))
    if named:
        name = named[1] if "." in named[1] else f"builtins.{named[1]}"
        if name not in (*known, *names):
            known.append(name)
    return known


def _runs_programs(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return not isinstance(getattr(builtins, attribute, None), type)  # eval, getattr, ...
    return _PROGRAMS.match(module) is not None


def _found(stored: str, name: str) -> Any:
    module_name, _, attribute = name.rpartition(".")
    if not module_name or not attribute or not stored:
        raise UserError(f"argument `allow_classes`: invalid value {name!r}: give module.Class, e.g. argparse.Namespace")
    if _runs_programs(name) or _runs_programs(stored):
        raise UserError(
            f"argument `allow_classes`: invalid value {name}: it could run any program, and is never allowed"
        )
    for module in (module_name, *(new + module_name[len(old) :] for old, new in _RENAMED if _is_in(module_name, old))):
        with failures_explained(f"argument `allow_classes`: importing {module} failed"):
            try:
                found = getattr(importlib.import_module(module), attribute)
            except (ModuleNotFoundError, AttributeError):
                continue
        if not callable(found):
            raise UserError(f"argument `allow_classes`: invalid value {name}: a {type(found).__name__}, not a class")
        return found
    raise UserError(
        f"argument `allow_classes`: there is no {name}, neither here nor among the installed packages; if its module "
        f"is another here, give `allow_classes` {stored}=MODULE.{attribute}"
    )


def _is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
