"""compute-sanitizer over every kernel: memory errors, races in shared memory, reads of uninitialised memory."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks.gpu_check import programs

from .conftest import REHEARSED

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
_SECONDS = 150.0
_REHEARSED = "float32 weights, fp32|pgd_step inf, float32, on chip"


@pytest.mark.parametrize("tool", ["memcheck"] if REHEARSED else _TOOLS)
def test_nothing_is_found(tool: str, device: str) -> None:
    sanitizer = programs.find("compute-sanitizer")
    if sanitizer is None and not REHEARSED:
        pytest.skip("no compute-sanitizer on PATH or in the CUDA toolkit")
    filters, cases = _TOOLS[tool]
    program = [sys.executable, "-m", "tests.gpu.exercise", "--device", device]
    program += ["--only", _REHEARSED if REHEARSED else cases]
    watch = [] if REHEARSED else [str(sanitizer), "--tool", tool, "--print-limit", "30", "--error-exitcode", "66"]
    output, code = programs.run([*watch, *([] if REHEARSED else filters), *program], _SECONDS, _UNCACHED)
    if code is not None and not re.search(r"^ran", output, re.MULTILINE) and filters and not REHEARSED:
        # A sanitizer with other names for its options: watch all kernels.
        output, code = programs.run([*watch, *program], _SECONDS, _UNCACHED)
    ran = len(re.findall(r"^ran: ", output, re.MULTILINE))
    report = [line for line in output.splitlines() if line.startswith("=====")][:60] or output.splitlines()[-20:]
    assert count_errors(output) == (None if REHEARSED else 0), "\n".join(report)
    assert code is not None, f"stopped after {ran} cases, no error so far"
    assert re.search(r"^ran \d+ cases", output, re.MULTILINE), "\n".join(report)


def count_errors(output: str) -> int | None:
    """From the sanitizer's last lines; None where there is no verdict."""
    hazards = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", output)
    found = hazards or re.search(r"ERROR SUMMARY: (\d+) error", output)
    return int(found[1]) if found else None


@pytest.mark.parametrize(
    ("output", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 12 errors", 12),
        ("========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)\n", 3),
        ("killed", None),
    ],
)
def test_the_verdict_is_read(output: str, errors: int | None) -> None:
    assert count_errors(output) == errors
