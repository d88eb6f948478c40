"""The tests of what only a GPU can tell (tests/gpu), and the suite with tensors on the GPU (tests/on_device.py)."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from .. import results
from ..context import Context

_RESERVE = 5.0  # seconds to read the report in
_WORKERS = 12


def run(context: Context) -> None:
    """Counts, and the names of what failed; also of a run that had to be stopped."""
    # What meets kernels, first; layers and bounds of whole networks are plain PyTorch.
    on_gpu = ["tests/gpu", "tests/kernels", "tests/attacks", "tests/norms", "tests/normalization"]
    where = context.pick(on_gpu, ["tests/gpu", "tests/kernels/test_random_start.py", "tests/norms/test_estimate.py"])
    command = [sys.executable, "-m", "pytest", *where, "-q", "--no-header", "--tb=no"]
    command += ["-p", "benchmarks.gpu_check.report_plugin", "-p", "no:cacheprovider", "-m", "not slow"]
    cores = len(os.sched_getaffinity(0))
    if importlib.util.find_spec("xdist") and cores > 2 and not context.rehearse:
        command += ["-n", str(min(_WORKERS, cores)), "--dist", "worksteal"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.jsonl")
        env = os.environ | {
            "SN_FAST_TEST_DEVICE": context.device,
            "SN_FAST_GPU_TESTS": context.pick("", "rehearsed"),
            "SN_FAST_TEST_REPORT": str(report),
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",  # the workers have to agree on the tests' names and order
        }
        reference = next((p for p in _references() if p.is_dir()), None)
        if reference:
            env.setdefault("SN_FAST_REFERENCE", str(reference))
        try:
            # Its output is a dot per test: the report says more.
            done = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=max(5.0, context.left() - _RESERVE)
            )
            ended, output = done.returncode in (0, 1), done.stdout + done.stderr
        except subprocess.TimeoutExpired as error:
            ended, output = False, f"{_text(error.stdout)}{_text(error.stderr)}"
        lines = report.read_text().splitlines() if report.exists() else []
    print(output[-3000:], flush=True)
    tests = [json.loads(line) for line in lines if line.endswith("}")]
    counts = Counter(t["outcome"] for t in tests)
    context.record("counts", dict(counts))
    context.record("ended", ended)
    context.record(
        "failures", [{k: t[k] for k in ("test", "message")} for t in tests if t["outcome"] in ("failed", "error")]
    )
    slowest = sorted(tests, key=lambda t: -t["seconds"])[:10]
    context.record("slowest", [{k: t[k] for k in ("test", "seconds")} for t in slowest])
    for t in tests:
        if t["outcome"] in ("failed", "error"):
            context.fail(f"{t['test']}: {t['message'][:200]}")
    if not ended:
        context.fail(f"the tests did not run to their end: {output.strip()[-300:]}")


def _references() -> list[Path]:
    return [results.ROOT / "shared" / "reference", results.ROOT.parent / "shared" / "reference"]


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
