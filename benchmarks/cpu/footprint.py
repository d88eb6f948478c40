"""Table ``footprint``: import, wheel, installation, and peak memory of a training step, each in its own process.

``python -m benchmarks.cpu.footprint METHOD`` prints the peak memory of one training step in MB, as that process.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..gpu_check.results import ROOT
from .data import missing

_IMPORT = """
import json, time
def cost(name):
    start = time.process_time()
    __import__(name)
    return time.process_time() - start
print(json.dumps({"torch": cost("torch"), "sn_fast": cost("sn_fast"), "sn_fast.attacks": cost("sn_fast.attacks")}))
"""
_MEASURED = ("no SN", "sn_fast", "sn_fast, projection", "torch", "published loop", "deel-torchlip")
_NETWORK = "ResNet-18"
_NOT_COPIED = shutil.ignore_patterns(".git", "build", "__pycache__", "*.so", "*.egg-info", "runs", ".*_cache")


def rows(quick: bool = False) -> dict[str, Callable[[], Mapping[str, Any]]]:
    found: dict[str, Callable[[], Mapping[str, Any]]] = {"import": partial(_imports, 1 if quick else 3)}
    if not quick:
        found["wheel"] = _wheel
        found |= {f"memory, {name}": partial(_memory, name) for name in _MEASURED}
    return found


def _imports(repeats: int) -> dict[str, Any]:
    """Seconds on the processor: sn_fast after torch, sn_fast.attacks after both."""
    runs = [json.loads(_python("-c", _IMPORT)) for _ in range(repeats)]
    return {f"{name}_s": round(statistics.median(run[name] for run in runs), 3) for name in runs[0]}


def _wheel() -> dict[str, Any]:
    """A wheel without kernels, built from a copy of the sources and what the index has for that; its installation."""
    with tempfile.TemporaryDirectory() as folder:
        source, wheels, target = (Path(folder, name) for name in ("source", "wheels", "target"))
        shutil.copytree(ROOT, source, ignore=_NOT_COPIED)
        pip, quiet = ("-m", "pip"), ("--quiet", "--disable-pip-version-check", "--no-deps")
        start = time.perf_counter()
        _python(*pip, "wheel", str(source), "-w", str(wheels), *quiet, SN_FAST_CUDA="0")
        built = time.perf_counter()
        (wheel,) = wheels.glob("*.whl")
        _python(*pip, "install", str(wheel), "--target", str(target), *quiet)
        installed = time.perf_counter()
        return {
            "wheel_kb": round(wheel.stat().st_size / 1024),
            "build_s": round(built - start, 1),
            "install_s": round(installed - built, 1),
        }


def _memory(method: str) -> dict[str, Any]:
    from .methods import METHODS

    if how := METHODS[method].package and missing(METHODS[method].package):
        return {"missing": how}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu.footprint", method], cwd=ROOT, capture_output=True, text=True
    )
    if run.returncode:
        return {"error": "exit code", "message": run.stderr.strip().split("\n")[-1][:160]}
    return dict(json.loads(run.stdout))


def _python(*arguments: str, **environment: str) -> str:
    command = [sys.executable, *arguments]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(
        command, env=variables | environment, capture_output=True, text=True, check=True, cwd=tempfile.gettempdir()
    )
    return run.stdout


def _peak(method: str) -> dict[str, Any]:
    """MB that this process held at most, all of Python and torch included, over three training steps."""
    import torch

    from .methods import METHODS, NotOffered
    from .networks import NETWORKS
    from .training import BATCH, SCHEMES, step_of

    torch.set_num_threads(1)
    network = NETWORKS[_NETWORK]
    try:
        normalised = METHODS[method].apply(network.seeded(), network.example())
    except NotOffered as reason:
        return {"not_offered": str(reason)}
    step = step_of(normalised, SCHEMES["plain"], network.example(BATCH), torch.arange(BATCH) % 10)
    for _ in range(3):
        step()
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)}


if __name__ == "__main__":
    print(json.dumps(_peak(sys.argv[1])))
