"""The compiled module, if there is one; nothing else imports ``sn_fast._C``. It knows no torch, nor does this file."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import platform
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from .._version import __version__

_REMEDY = "reinstall sn_fast (docs/building.md)"


def load(name: str, version: str) -> tuple[ModuleType | None, str]:
    """The module ``name`` and one sentence about it; None if it was not built, or if it was but will not load."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None, _absent(name)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return None, f"built but will not load: {error}"
    if module.version != version:  # addresses are handed over unchecked, so the two sides must be of one version
        return None, f"built but will not load: it is of sn_fast {module.version}, and this is {version}"
    return module, f"CUDA kernels for {module.archs}, built with CUDA {module.cuda_version}"


def covers(archs: str, capability: tuple[int, int], jit: bool = True) -> bool:
    """Whether kernels built for ``archs`` run on a GPU of this compute capability; without ``jit``, as they are."""
    for major, minor, suffix, ptx in re.findall(r"(\d+)\.(\d+)([af]?)(\+PTX)?", archs):
        built = (int(major), int(minor))
        older = built <= capability and suffix != "a"  # code with an a runs on that very GPU only
        if built == capability or (older and (built[0] == capability[0] or (jit and ptx and not suffix))):
            return True
    return False


def driver_version() -> tuple[int, int] | None:
    """The newest CUDA version that the driver supports; None without a driver."""
    number = ctypes.c_int()
    try:
        found = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0
    except OSError:
        return None
    return (number.value // 1000, number.value % 1000 // 10) if found else None


def too_old(driver: tuple[int, int] | None, module: ModuleType, capabilities: Iterable[tuple[int, int]] = ()) -> bool:
    """Whether a driver cannot run a module on GPUs of these compute capabilities.

    It runs kernels of its own CUDA major version and of older ones. Where it has to compile them first, from PTX for a
    newer GPU than they were built for, its CUDA version must not be older at all.
    """
    if driver is None:
        return False
    major, minor = map(int, module.cuda_version.split(".")[:2])
    compiles = any(covers(module.archs, c) and not covers(module.archs, c, jit=False) for c in capabilities)
    return driver < (major, minor) if compiles else driver[0] < major


def _absent(name: str) -> str:
    folder = Path(importlib.import_module(name.rpartition(".")[0]).__path__[0])
    others = [path.name for path in sorted(folder.glob("_C.*.so"))]
    if others:
        return f"built but will not load: {', '.join(others)} is not for this Python {platform.python_version()}"
    note = folder / "_not_built.txt"
    reason = note.read_text("utf-8", "replace") if note.exists() else "no kernels were compiled here"
    return f"not built: pure-Python install ({reason})"


MODULE, STATUS = load("sn_fast._C", __version__)

if STATUS.startswith("built but"):
    warnings.warn(f"sn_fast {__version__} runs without its CUDA kernels. They are {STATUS}; {_REMEDY}", stacklevel=2)
