"""Blocks that really run at once, under ThreadSanitizer: nothing that one block reads of another's is left to luck.

What orders them is modelled in csrc/emulator/memory_model.h, as strictly as PTX defines it. Every fault that is planted
here must be found, or the silence about the kernels as they are would say nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest

from ..on_device import DEVICE
from . import emulator
from .test_safety_net import Edit, edited

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(DEVICE.type != "cpu", reason="ThreadSanitizer watches the CPU"),
    pytest.mark.skipif(emulator.sanitizers_loaded(), reason="two sanitizers do not go together"),
]

FLAGS = ["-Wno-error", "-fsanitize=thread", "-g1"]
PROGRAM = """
    import torch
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from pathlib import Path
    from sn_fast import ConvOperator, MatrixOperator
    from sn_fast.ops.library import UseKernels
    from sn_fast.ops.prepared_step import prepare
    from sn_fast.ops.records import length_of
    from tests.kernels import emulator
    from tests.kernels.power_steps import Call, planning
    from tests.kernels.weight_gradients import Call as Gradient, parts

    module = emulator.load(Path({library!r}))
    operators = [
        ConvOperator(torch.randn(64, 32, 3, 3), (6, 6), padding=1),
        ConvOperator(torch.randn(20, 10, 9), (15,), padding=4),
        ConvOperator(torch.randn(3, 24, 3, 3), (6, 6), padding=1),
        MatrixOperator(torch.randn(16, 600)),
        MatrixOperator(torch.randn(500, 20)),
    ]

    def steps():
        call = Call.of(*operators)
        with planning(split=True, parallel=9):
            call.run()
        with planning(parallel=9):
            call.run(precision="3xtf32")
        with parts(3):
            Gradient.of(operators[0]).run()

    def refresh():
        call = Call.of(*operators)
        sigmas = [torch.zeros(()) for _ in operators]
        with planning(split=True, parallel=9):
            step = prepare(call.weights, call.us, call.vs, sigmas, [None] * len(sigmas), call.code, "fp32")
        records = [torch.zeros(length_of(w.numel()), dtype=torch.int64) for w in call.weights]
        found = []
        for changed in ([], [0, 3], []):
            for i in changed:
                call.weights[i].mul_(1.01)
            found.append(step.refresh(2, records, copies=True, vectors=True).changes.tolist())
        assert found == [[2] * 5 + [5], [1, 0, 0, 1, 0, 2], [0] * 6], found

    served = UseKernels(module, "cpu")
    module.set_parallel(3)
    for order in {orders!r}:
        module.set_thread_order(order)
        {runs}()
    served.stop()
    print("finished")
"""


def watched(folder: Path, *edits: Edit, runs: str, orders: Sequence[int] = (0, 1)) -> str:
    """What a process says in which blocks run at once."""
    library = emulator.library(edited(folder, *edits) if edits else emulator.CSRC, extra=FLAGS)
    program = textwrap.dedent(PROGRAM).format(library=str(library), orders=tuple(orders), runs=runs)
    # Addresses at random may lie where ThreadSanitizer keeps its own.
    fixed = [setarch, os.uname().machine, "-R"] if (setarch := shutil.which("setarch")) else []
    environment = os.environ | {
        "LD_PRELOAD": emulator.library_of_compiler("libtsan.so"),
        "TSAN_OPTIONS": "exitcode=0 report_thread_leaks=0 halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*fixed, sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(("runs", "orders"), [("steps", range(4)), ("refresh", range(2))], ids=["steps", "refresh"])
def test_blocks_at_once_are_ordered_where_they_meet(tmp_path: Path, runs: str, orders: Sequence[int]) -> None:
    said = watched(tmp_path, orders=orders, runs=runs)
    assert "WARNING: ThreadSanitizer" not in said, said[:8000]
    assert "finished" in said, said[-8000:]


BEFORE, AFTER = (
    "        __threadfence();\n        last = ",
    "== split.parts - 1;\n        __threadfence();\n",
)
MEETING = f"    __syncthreads();\n    if (thread == 0) {{\n{BEFORE}"
FAULTS: dict[str, Sequence[Edit]] = {
    "no fence before counting": [(BEFORE, "        last = ")],
    "no fence after counting": [(AFTER, "== split.parts - 1;\n")],
    "one thread fences, before the barrier": [
        (
            MEETING,
            "    if (thread == 0) __threadfence();\n    __syncthreads();\n    if (thread == 0) {\n        last = ",
        ),
    ],
    "every thread fences, before the barrier": [
        (MEETING, "    __threadfence();\n    __syncthreads();\n    if (thread == 0) {\n        last = "),
    ],
    "no barrier before counting": [(MEETING, MEETING.replace("    __syncthreads();\n", ""))],
    "no barrier after counting": [(f"{AFTER}    }}\n    __syncthreads();\n", f"{AFTER}    }}\n")],
    "parts counted without an atomic": [("atomicAdd(split.counter, 1)", "(*split.counter)++")],
    "items taken without an atomic": [
        ("            next = atomicAdd(p.taken, 1);", "            next = (*p.taken)++;"),
    ],
    "no barrier at an item's end": [("        __syncthreads();  // the next item uses the same shared memory\n", "")],
    "no barrier in the gemm tile": [
        (
            "wait_for_copies<kWeightStages - 2>();\n                __syncthreads();",
            "wait_for_copies<kWeightStages - 2>();",
        )
    ],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(tmp_path: Path, name: str) -> None:
    said = watched(tmp_path, *FAULTS[name], runs="steps")
    assert "WARNING: ThreadSanitizer: data race" in said, said[-8000:]


HASHED = "atomicAdd(&p.sums[unit.op], sum);\n"
COMPARED = "== w.units - 1;\n        __threadfence();\n"
FAULTS_OF_A_REFRESH: dict[str, Sequence[Edit]] = {
    "no fence before counting": [(f"{HASHED}        __threadfence();\n", HASHED)],
    "no fence after counting": [(COMPARED, "== w.units - 1;\n")],
    "no barrier after counting": [(f"{COMPARED}    }}\n    __syncthreads();\n", f"{COMPARED}    }}\n")],
    "hashes added without an atomic": [(HASHED, "p.sums[unit.op] += sum;\n")],
    "changes counted without an atomic": [("atomicAdd(&p.changes[p.n_operators], 1)", "++p.changes[p.n_operators]")],
    "no barrier at the end of an item that is left out": [
        (
            "if (!p.changes || p.changes[s.map.op] != 0) {",
            "if (p.changes && p.changes[s.map.op] == 0) continue;\n{",
        ),
    ],
}


@pytest.mark.parametrize("name", FAULTS_OF_A_REFRESH)
def test_a_fault_planted_in_a_refresh_is_found(tmp_path: Path, name: str) -> None:
    said = watched(tmp_path, *FAULTS_OF_A_REFRESH[name], runs="refresh")
    assert "WARNING: ThreadSanitizer: data race" in said, said[-8000:]
