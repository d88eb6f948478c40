"""The command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(*argv: str, cwd: Path, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen[bytes]:
    """``python -m sn_fast`` in the folder ``cwd``, whose modules come first."""
    path = os.pathsep.join(filter(None, [str(cwd), str(ROOT), os.environ.get("PYTHONPATH")]))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "-m", "sn_fast", *argv]
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path, **(env or {})}, **pipes)  # type: ignore[call-overload,no-any-return]


def wait_for(path: Path, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)
