"""The tools of a CUDA toolkit that stages run: where they are, and how they are stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def find(name: str) -> Path | None:
    """On PATH, or in the usual places of a toolkit."""
    places = [shutil.which(name), *Path("/usr/local").glob(f"cuda*/bin/{name}")]
    places += [*Path("/usr/local").glob(f"cuda*/{name}/{name}"), *Path("/opt/nvidia").glob(f"*/*/{name}")]
    return next((Path(p) for p in places if p and os.access(p, os.X_OK)), None)


def run(command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None) -> tuple[str, int | None]:
    """Output, and the exit code; None: it did not end in time. Then, or if the stage is stopped, all of it is."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:  # a pipe would be lost with a program that is stopped
        process = subprocess.Popen(
            command,
            env=None if env is None else os.environ | env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)  # also the program that the tool watches
                process.wait()
        file.seek(0)
        return file.read(), code
