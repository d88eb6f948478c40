"""compute-sanitizer over every kernel: memory errors, races in shared memory, reads of uninitialised memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from .. import programs
from ..context import Context

_CASES = "float32|bfloat16 weights, bf16|float16, on chip"
_FEWER = "float32 weights, (fp32|tf32)|(normalize|float32, on chip)"
_MINE = ("--kernel-name", "kns=sn_fast")  # torch's own kernels are not watched
# initcheck has to see everyone's writes, so that it watches torch's kernels too.
_TOOLS = {
    "memcheck": (_MINE, _CASES),
    "racecheck": (_MINE, _CASES),
    "synccheck": (_MINE, _FEWER),
    "initcheck": ((), _FEWER),
}
# Without torch's cache every tensor is an allocation of its own, whose ends the sanitizer knows.
_UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
_LEAST = 12.0  # seconds that a tool needs
_RESERVE = 3.0
_REHEARSED = "float32 weights, fp32|pgd_step inf, float32, on chip"


def run(context: Context) -> None:
    """Errors per tool, and the head of the report where there are any."""
    sanitizer = programs.find("compute-sanitizer")
    if sanitizer is None and not context.rehearse:
        raise RuntimeError("no compute-sanitizer on PATH or in the CUDA toolkit")
    for i, tool in enumerate(_TOOLS if not context.rehearse else ["memcheck"]):
        if context.has_time(tool, _LEAST):
            seconds = context.left() - _RESERVE if i == len(_TOOLS) - 1 else 0.6 * context.left()
            context.attempt(tool, lambda t=tool, s=seconds: _check(context, sanitizer, t, s))  # type: ignore[misc]


def _check(context: Context, sanitizer: Path | None, tool: str, seconds: float) -> None:
    filters, cases = _TOOLS[tool]
    if context.rehearse:
        cases = _REHEARSED
    program = [sys.executable, "-m", "benchmarks.gpu_check.exercise", "--device", context.device, "--only", cases]
    watch = [str(sanitizer), "--tool", tool, "--print-limit", "30", "--error-exitcode", "66"]
    output, code = programs.run([*([] if context.rehearse else [*watch, *filters]), *program], seconds, _UNCACHED)
    if code is not None and not re.search(r"^ran", output, re.MULTILINE) and filters and not context.rehearse:
        # A sanitizer with other names for its options: watch all kernels.
        print(output[-1500:], flush=True)
        output, code = programs.run([*watch, *program], seconds, _UNCACHED)
    ended = code is not None
    ran = len(re.findall(r"^ran: ", output, re.MULTILINE))
    errors = count_errors(output)
    context.record(tool, {"errors": errors, "cases": ran, "ended": ended})
    print(f"{tool}: {errors} errors in {ran} cases{'' if ended else ', stopped'}", flush=True)
    finished = re.search(r"^ran \d+ cases", output, re.MULTILINE)
    if errors or (ended and not finished):
        head = [line for line in output.splitlines() if line.startswith("=====")][:60] or output.splitlines()[-20:]
        context.record(f"{tool}_report", head)
        print("\n".join(head), flush=True)
        context.fail(f"{tool}: {f'{errors} errors' if errors else 'the program did not end'}")
    elif not context.rehearse and (errors is None or not ended):
        context.fail(f"{tool}: stopped after {ran} cases, no error so far")


def count_errors(output: str) -> int | None:
    """From the sanitizer's last lines; None where there is no verdict."""
    hazards = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", output)
    found = hazards or re.search(r"ERROR SUMMARY: (\d+) error", output)
    return int(found[1]) if found else None
