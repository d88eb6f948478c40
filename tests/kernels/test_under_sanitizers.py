"""The tests of the kernels once more, under AddressSanitizer and UBSan: an index out of bounds ends them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ..on_device import DEVICE
from . import emulator


@pytest.mark.slow
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the sanitizers watch the CPU")
@pytest.mark.skipif(emulator.sanitizers_loaded(), reason="this is the run under sanitizers")
def test_kernels_under_sanitizers() -> None:
    """With a few of each test's parameters and a tenth of its drawn cases (``conftest``, ``small_operators.drawn``).

    Without what compiles code of its own, which is not watched.
    """
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent), "-q", "-x", "-p", "no:cacheprovider"]
    command += ["--capture=sys"]  # what a sanitizer says goes past Python, and must not be lost with the process
    done = subprocess.run(
        [*command, "-k", "not compile"],
        cwd=Path(__file__).parents[2],
        env=emulator.sanitized_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[:12000]}"
