"""Nsight Compute's counters of the main kernels: which limit each is at, and what its warps wait for."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterator
from typing import Any

from .. import programs
from ..context import Context

_KERNELS = (
    "power_step_half|power_step_finish|normalize_weights|normalize_backward_dot|normalize_backward_gradient|pgd_step_.*"
)
_STALLS = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
_WAITS = ("long_scoreboard", "short_scoreboard", "barrier", "mio_throttle", "lg_throttle", "math_pipe_throttle", "wait")
METRICS = {
    "microseconds": "gpu__time_duration.sum",
    "of_peak_arithmetic": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "of_peak_dram": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram_bytes": "dram__bytes.sum",
    "of_issue_slots": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "of_fma_pipe": "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    "of_tensor_pipe": "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "warps_active": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "busiest_over_mean_cycles": "sm__cycles_active.max",  # divided by the next one
    "mean_cycles": "sm__cycles_active.avg",
    "bank_conflicts": "l1tex__data_bank_conflicts_pipe_lsu.sum",
    **{f"waits_for_{name}": _STALLS.format(name) for name in _WAITS},
}
_UNITS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
_UNITS |= {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def run(context: Context) -> None:
    """One entry per launch, in the order of ``profiled``."""
    profiler = programs.find("ncu")
    if profiler is None and not context.rehearse:
        raise RuntimeError("no ncu on PATH or in the CUDA toolkit")
    watch = [str(profiler), "--csv", "--page", "raw", "--clock-control", "none", "--target-processes", "all"]
    watch += ["--profile-from-start", "off"]  # not the warm-up, nor the hundreds of launches that find the first sigma
    watch += ["--kernel-name", f"regex:{_KERNELS}", "--metrics", ",".join(METRICS.values())]
    program = [sys.executable, "-m", "benchmarks.gpu_check.profiled", "--device", context.device]
    command = [*program, "--small"] if context.rehearse else [*watch, *program]
    output, code = programs.run(command, max(5.0, context.left() - 3))
    if code or "ran: pgd_step 2" not in output:
        raise RuntimeError(f"exit code {code}: {output.strip()[-1500:]}")
    launches = list(read(output))
    context.record("launches", launches)
    for launch in launches:
        numbers = ", ".join(f"{k} {v:.4g}" for k, v in launch.items() if k != "kernel" and not k.startswith("waits"))
        print(f"{launch['kernel']}: {numbers}", flush=True)
    if not launches and not context.rehearse:
        context.fail(f"ncu told of no kernel: {output.strip()[-500:]}")


def read(text: str) -> Iterator[dict[str, Any]]:
    """Launches, from ``ncu --csv --page raw``: a line of names, one of units, then one per launch."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return
    table = [row for row in csv.reader(io.StringIO("\n".join(lines[start:]))) if len(row) > 3]
    names, units, *rows = table
    for row in rows:
        cells = dict(zip(names, row))
        if not cells.get("ID", "").isdigit():
            continue
        scales = {name: _UNITS.get(unit, 1.0) for name, unit in zip(names, units)}
        launch: dict[str, Any] = {"kernel": re.split(r"[(<]", cells.get("Kernel Name", ""))[0].split("::")[-1]}
        for key, metric in METRICS.items():
            try:
                launch[key] = float(cells[metric].replace(",", "")) * scales[metric]
            except (KeyError, ValueError):  # this version of ncu, or this GPU, has no such counter
                continue
        if launch.get("mean_cycles"):
            launch["busiest_over_mean_cycles"] /= launch["mean_cycles"]
        yield launch
