"""Kernels broken on purpose: thread orders, the comparison with the reference and the sanitizers must find it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from sn_fast import ConvOperator, LinearOperator, MatrixOperator
from sn_fast.ops.library import UseKernels

from ..attacks.models import same_bits
from ..on_device import DEVICE
from . import emulator
from .conftest import THREAD_ORDERS
from .power_steps import Call, kinds_of, planning
from .weight_gradients import Call as Gradient

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="edits kernels and runs them on the CPU")

Edit = tuple[str, str]


def edited(folder: Path, *edits: Edit) -> Path:
    """A copy of csrc in which each edit's text, which stands in one place, is replaced."""
    copy = shutil.copytree(emulator.CSRC, folder / "csrc")
    sources = [path for path in copy.rglob("*") if path.suffix in (".h", ".cuh", ".cu")]
    for old, new in edits:
        found = [path for path in sources for _ in range(path.read_text().count(old))]
        assert len(found) == 1, f"{old!r} stands in {len(found)} places: the kernels have changed, so must the edit"
        found[0].write_text(found[0].read_text().replace(old, new))
    return copy


def build(folder: Path, *edits: Edit) -> ModuleType:
    return emulator.build(edited(folder, *edits), extra=["-Wno-error"])


def operators() -> list[LinearOperator]:
    """Together they run every kind of tile, with sums split and whole."""
    return [
        ConvOperator(torch.randn(70, 20, 3), (70,), padding=1),
        ConvOperator(torch.randn(64, 128, 3, 3), (8, 8), padding=1),
        ConvOperator(torch.randn(40, 30, 3, 3), (4, 4), padding=1),
        ConvOperator(torch.randn(20, 10, 9, 9), (5, 5), padding=4),
        ConvOperator(torch.randn(3, 64, 3, 3), (12, 12), padding=1),
        ConvOperator(torch.randn(48, 1, 3, 3), (7, 7), padding=1, groups=48),
        MatrixOperator(torch.randn(16, 5000)),
        MatrixOperator(torch.randn(3000, 40)),
        MatrixOperator(torch.randn(20, 30)),
    ]


def results(module: ModuleType, order: int, gradients: bool = True) -> list[Tensor]:
    """Of all kinds of tiles, in one order of threads, also with many parts to every sum; and weights' gradients."""
    torch.manual_seed(0)
    call = Call.of(*operators())
    served = UseKernels(module, "cpu")
    found: list[Tensor] = []
    try:
        module.set_thread_order(order)
        for split in (False, True):
            with planning(split=split, parallel=9):
                found += [t for part in call.run() for t in part]
        found += [Gradient.of(op).run() for op in operators()[:5] if gradients]
    finally:
        module.set_thread_order(0)
        served.stop()
    return found


def wrong_orders(
    module: ModuleType,
    broken: ModuleType,
    orders: Sequence[int] = (*THREAD_ORDERS, 4, 5),
    gradients: bool = True,
) -> list[int]:
    """The orders of threads in which the broken kernels' results differ from those of the right ones."""
    right = results(module, 0, gradients)
    return [order for order in orders if not all(map(same_bits, results(broken, order, gradients), right))]


@pytest.mark.slow
def test_an_edit_that_changes_nothing_is_not_found(tmp_path: Path, module: ModuleType) -> None:
    """Otherwise what is found below would say nothing."""
    kinds = kinds_of(Call.of(*operators()))
    with planning(split=True):
        kinds |= kinds_of(Call.of(*operators()))
    assert len(kinds) == 10  # every kind, split and whole
    unchanged = build(tmp_path, ("constexpr int kTileSlots = 64;", "constexpr int kTileSlots = 32 + 32;"))
    assert wrong_orders(module, unchanged) == []


def test_a_barrier_missing_from_the_gemm_tile(tmp_path: Path, module: ModuleType) -> None:
    broken = build(
        tmp_path, ("wait_for_copies<kWeightStages - 2>();\n                __syncthreads();", "wait_for_copies<0>();")
    )
    assert wrong_orders(module, broken)


BARRIERS: dict[str, Edit] = {
    "gemm: slots before their use": (
        "slots_at(p.table, item.slots)[begin + thread];\n            __syncthreads();",
        "slots_at(p.table, item.slots)[begin + thread];",
    ),
    "gemm: positions before their use": (
        "        __syncthreads();\n        // 3) Chunk after chunk.",
        "        // 3) Chunk after chunk.",
    ),
    "gemm: the last product before the tables are free": (
        "        // 4) The tables and buffers are free again.\n        __syncthreads();",
        "",
    ),
    "gemm: the result before its rows are stored": (
        "s.result[product.row(i)][product.column(i)] = product.sums[i];\n        __syncthreads();",
        "s.result[product.row(i)][product.column(i)] = product.sums[i];",
    ),
    "gemm: copies waited for too late": (
        "wait_for_copies<kWeightStages - 2>();",
        "wait_for_copies<kWeightStages - 1>();",
    ),
    "direct: the slots' weights": (
        "            __syncwarp();\n            // 2) All (slot, channel) pairs,",
        "            // 2) All (slot, channel) pairs,",
    ),
    "half_step: the first number": (
        "if (opaque_thread_index() == 0) s.next = atomicAdd(p.taken, 1);\n    __syncthreads();",
        "if (opaque_thread_index() == 0) s.next = atomicAdd(p.taken, 1);",
    ),
    "half_step: the item before its map": (
        "copy_by_lanes(s.item, p.items + number, thread);\n            __syncwarp();",
        "copy_by_lanes(s.item, p.items + number, thread);",
    ),
    "half_step: the item before its use": (
        "        __syncthreads();\n        if (thread == kWarp) s.next = next;",
        "        if (thread == kWarp) s.next = next;",
    ),
    "half_step: the end of an item": (
        "        __syncthreads();  // the next item uses the same shared memory\n",
        "",
    ),
    "gradient: the first positions": (
        "find_positions(begin, 0);\n            __syncthreads();",
        "find_positions(begin, 0);",
    ),
    "gradient: the taps before their use": (
        "s.entry[thread][2] = g.entry[2] + tap % slots2;\n        }\n        __syncthreads();",
        "s.entry[thread][2] = g.entry[2] + tap % slots2;\n        }",
    ),
    "gradient: the first chunk": ("stage(0);\n            __syncthreads();", "stage(0);"),
    "gradient: the next chunk": (
        "stage(buffer ^ 1);\n                __syncthreads();",
        "stage(buffer ^ 1);",
    ),
    "dot: the vector's chunk": ("s.x[i] = x[chunk + i];\n        __syncthreads();", "s.x[i] = x[chunk + i];"),
    "dot: the rows' sums": (
        "s.values[warp * kDotRows + r] = sum;\n    }\n    __syncthreads();",
        "s.values[warp * kDotRows + r] = sum;\n    }",
    ),
    "axpy: the columns' sums": (
        "s.columns[first][lane * kVector + e] = sums[e];\n    __syncthreads();",
        "s.columns[first][lane * kVector + e] = sums[e];",
    ),
    "block_reduce: warps before the sum": (
        "scratch[thread / kWarp] = value;\n    __syncthreads();",
        "scratch[thread / kWarp] = value;",
    ),
    "join_splits: who is last": (
        "split.parts - 1;\n        __threadfence();\n    }\n    __syncthreads();",
        "split.parts - 1;\n        __threadfence();\n    }",
    ),
    "finish: the warps' largest": (
        "s.best[thread / kWarp] = best;\n    __syncthreads();",
        "s.best[thread / kWarp] = best;",
    ),
}


def broken_in_a_child(folder: Path, edit: Edit, environment: dict[str, str] | None = None) -> str | None:
    """What a process says in which a broken kernel runs, for it may do anything; None if it just crashes."""
    program = f"""
        from pathlib import Path
        from tests.kernels import emulator, test_safety_net as net
        broken = emulator.build(Path({str(edited(folder, edit))!r}), extra=["-Wno-error"])
        print("wrong in orders", net.wrong_orders(emulator.build(), broken) or "none")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return None if done.returncode < 0 else done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier(tmp_path: Path, name: str) -> None:
    said = broken_in_a_child(tmp_path, BARRIERS[name])
    assert said is None or "deadlock" in said or "wrong in orders [" in said  # None: it crashed


DIVERGED: dict[str, Edit] = {
    "a reduction of one thread": (
        "const double total = block_reduce(square_sum, Add{}, scratch);",
        "if (threadIdx.x != 0) return;\n    const double total = block_reduce(square_sum, Add{}, scratch);",
    ),
    "a barrier that half a warp skips": (
        "value[0] += s.columns[r][thread];",
        "value[0] += s.columns[r][thread];\n    if (thread % 32 < 16) __syncwarp();",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIVERGED)
def test_a_barrier_that_some_threads_do_not_reach(tmp_path: Path, name: str) -> None:
    said = broken_in_a_child(tmp_path, DIVERGED[name])
    assert said is not None
    assert "RuntimeError: emulator: deadlock, some threads wait at a barrier others never reach" in said


PARTS = "for (int part = 0; part < split.parts; ++part)"
WRONG: dict[str, Edit] = {
    "an axis left out": ("? e0 + e1 + e2 : -1;\n}", "? e0 + e2 : -1;\n}"),
    "a chunk of weights too few": ("chunk < kWeightStages - 1; ++chunk)", "chunk < kWeightStages - 2; ++chunk)"),
    "a part left out": (PARTS, "for (int part = 1; part < split.parts; ++part)"),
    "parts in another order": (PARTS, "for (int part = split.parts - 1; part >= 0; --part)"),
    "parts in the order of arrival": (
        PARTS,
        "for (int step = 0, part = split.part; step < split.parts; ++step, part = (part + 1) % split.parts)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arithmetic(tmp_path: Path, name: str) -> None:
    said = broken_in_a_child(tmp_path, WRONG[name])
    assert said is not None
    assert "wrong in orders [" in said


@pytest.mark.slow
def test_bits_do_not_depend_on_the_number_of_blocks(tmp_path: Path, module: ModuleType) -> None:
    here = "inline int multiprocessors(int) { return "
    other = build(tmp_path, (f"{here}3;", f"{here}1000;"))
    assert other.parallel_blocks(0) == 3000
    # Plans are for 9 blocks all the same, but not those of gradients, whose sums are split for the blocks there are.
    assert wrong_orders(module, other, THREAD_ORDERS, gradients=False) == []


OVERFLOW = "ERROR: AddressSanitizer: heap-buffer-overflow"
BEYOND: dict[str, tuple[Edit, str, str]] = {  # what is said of it, and where
    "an item too many": (("number < p.n_items", "number <= p.n_items"), OVERFLOW, "power_step_half"),
    "a row beyond the last": (
        ("last_row = g.rows - item.row - 1;", "last_row = g.rows - item.row;"),
        OVERFLOW,
        "GemmTile<float",
    ),
    "a depth beyond the last": (
        ("kDepth + depth_b, depth - 1)", "kDepth + depth_b, 1 << 20)"),
        OVERFLOW,
        "GemmTile<float",
    ),
    "an element too many": (("if (e < count) sums[e]", "if (e <= count) sums[e]"), OVERFLOW, "axpy_tile"),
    "a wrong row": (("at[c * g.channel_stride + e]", "at[(c + 1) * g.channel_stride + e]"), OVERFLOW, "axpy_tile"),
    "a slot beyond its table": (
        ("std::int32_t position[kTileSlots * kColumns];", "std::int32_t position[1];"),
        "out of bounds for type",
        "gemm.cuh",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BEYOND)
def test_an_access_out_of_bounds(tmp_path: Path, name: str) -> None:
    edit, found, place = BEYOND[name]
    said = broken_in_a_child(tmp_path, edit, emulator.sanitized_environment())
    assert said is not None
    assert found in said, said[-4000:]
    assert place in said
