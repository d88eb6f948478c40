"""Builds the compiled module for the CPU: the same sources and bindings, over csrc/emulator in place of CUDA.

Objects are kept by the hash of what they are made from, so a second run compiles nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g1")
_FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-fvisibility=hidden",
)


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        pytest.skip("no g++: the kernels cannot be built for the CPU")
    return found


def sanitizers_loaded() -> bool:
    """Whether this process runs under AddressSanitizer (see ``sanitized_environment``)."""
    return "libasan" in os.environ.get("LD_PRELOAD", "")


def sanitized_environment() -> dict[str, str]:
    """Environment of a Python that can load a module built with ``SANITIZERS``."""
    libraries = [library_of_compiler(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        # Python and torch keep memory to the end; swapped stacks look like a use after return.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def library_of_compiler(name: str) -> str:
    path = subprocess.run([compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout
    return str(Path(path.strip()).resolve())


def build(csrc: Path = CSRC, name: str = "_emulator", extra: Sequence[str] = ()) -> ModuleType:
    """Compile and load ``csrc`` for the CPU, with sanitizers where this process can take them."""
    return load(library(csrc, name, extra), name)


def load(path: Path, name: str = "_emulator") -> ModuleType:
    # pybind11 keeps modules by their full name, of which only the last part has to be the library's.
    digest = path.name.removeprefix(f"{name}_").split(".")[0]
    spec = importlib.util.spec_from_file_location(f"{digest}.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def library(csrc: Path = CSRC, name: str = "_emulator", extra: Sequence[str] = ()) -> Path:
    """Compile ``csrc`` for the CPU."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed: pip install '.[test]'")
    flags = [
        *_FLAGS,
        *(SANITIZERS if sanitizers_loaded() else ()),
        *extra,
        f"-DSN_FAST_MODULE={name}",
        "-DSN_FAST_EMULATOR",
        '-DSN_FAST_VERSION="test"',
        '-DSN_FAST_ARCHS="CPU emulation"',
        '-DSN_FAST_CUDA_VERSION="none"',
        f"-I{csrc}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_path('include')}",
    ]
    sources = [*sorted(csrc.rglob("*.cu")), csrc / "bindings.cpp"]
    cache = Path(os.environ.get("SN_FAST_TEST_BUILD", Path(tempfile.gettempdir()) / f"sn_fast_emulator_{os.getuid()}"))
    cache.mkdir(parents=True, exist_ok=True)

    def key(source: Path) -> str:
        read = sorted(_files_read(source, csrc))
        parts = [str(path.relative_to(csrc)).encode() + path.read_bytes() for path in read]
        parts += [" ".join(flags).replace(str(csrc), "").encode()]
        parts += [sys.version.encode(), compiler().encode()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

    def compile_one(source: Path) -> Path:
        target = cache / f"{source.stem}_{key(source)}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            _run([compiler(), *flags, "-x", "c++", "-c", str(source), "-o", str(partial)])
            partial.replace(target)
        return target

    with (cache / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # parallel test processes wait for the first one's objects
        objects = list(pool.map(compile_one, sources))
        digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        result = cache / f"{name}_{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"
        if not result.exists():
            partial = result.with_suffix(f".{os.getpid()}.so")
            shared = [f for f in flags if f.startswith("-fsanitize")]
            _run([compiler(), "-shared", "-pthread", *shared, *map(str, objects), "-o", str(partial)])
            partial.replace(result)
    return result


def _files_read(source: Path, csrc: Path) -> set[Path]:
    """A source and, transitively, those of its includes that lie below ``csrc``."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found and path.exists():
            found.add(path)
            waiting += [csrc / name for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.MULTILINE)]
    return found


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-8000:]}")
