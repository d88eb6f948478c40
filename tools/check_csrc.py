"""Check csrc/ with clang-format, and with clang-tidy as the emulator compiles it; both are in the extra dev.

python tools/check_csrc.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sysconfig.get_path("scripts"))
SUFFIXES = {".cu", ".cuh", ".h", ".cpp"}
DEFINES = ("EMULATOR", "MODULE=_C", 'VERSION="-"', 'ARCHS="-"', 'CUDA_VERSION="-"')


def main() -> int:
    files = sorted(str(path) for path in (ROOT / "csrc").rglob("*") if path.suffix in SUFFIXES)
    formatted = call([str(BIN / "clang-format"), "--dry-run", "-Werror", *files])
    if formatted.returncode:
        print(f"{formatted.stderr}run: clang-format -i {' '.join(os.path.relpath(f, ROOT) for f in files)}")
    includes = ("csrc", pybind11.get_include(), sysconfig.get_path("include"))
    flags = ["-std=c++17", "-xc++", *(f"-DSN_FAST_{name}" for name in DEFINES), *(f"-I{path}" for path in includes)]
    sources = [file for file in files if file.endswith((".cu", ".cpp"))]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        runs = pool.map(lambda file: call([str(BIN / "clang-tidy"), "--quiet", file, "--", *flags]), sources)
        failed = [run for run in runs if run.returncode]
    for run in failed:
        print(run.stdout or run.stderr)
    wrong = bool(failed or formatted.returncode)
    print(f"csrc/: {len(files)} files, {len(sources)} of them compiled: {'faults' if wrong else 'good'}")
    return int(wrong)


def call(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
