"""The reading of the CUDA tools' output, on canned text; and, where there are the tools, the kernels themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks import machine_code
from benchmarks.machine_code import Kernel

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN7sn_fast5firstENS_1PE' for 'sm_90'
ptxas info    : Function properties for _ZN7sn_fast5firstENS_1PE
    16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 16 bytes cumulative stack size, 4096 bytes smem, 688 bytes cmem[0]
ptxas info    : Compile time = 1.0 ms
ptxas info    : Compiling entry function '_ZN7sn_fast6secondENS_1PE' for 'sm_90'
ptxas info    : Function properties for _ZN7sn_fast6secondENS_1PE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""

RESOURCES = """
Fatbin elf code:
================
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN7sn_fast5firstENS_1PE:
  REG:40 STACK:0 SHARED:512 LOCAL:0 CONSTANT[0]:688 TEXTURE:0 SURFACE:0 SAMPLER:0
Fatbin elf code:
================
arch = sm_90
 Function _ZN7sn_fast5firstENS_1PE:
  REG:38 STACK:8 SHARED:1536 LOCAL:0 CONSTANT[0]:688 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

ELF = """
arch = sm_90
    9    804     70  0  4                    CUDA_INFO       40    3        d .nv.info._ZN7sn_fast5firstENS_1PE
.nv.info._ZN7sn_fast5firstENS_1PE
	<0x1>
	Attribute:	EIATTR_CUDA_API_VERSION
	Format:	EIFMT_SVAL
	Value:	0x82
	<0x7>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x100 0x2 0x1
"""

SASS = """
	code for sm_90
		Function : _ZN7sn_fast5firstENS_1PE
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
                                                                                /* 0x000fe20000000800 */
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;    /* 0x0000000402047981 */
        /*0020*/                   LDG.E R4, desc[UR4][R2.64] ;                 /* 0x0000000402047981 */
        /*0030*/             @!UP0 STG.E.128 desc[UR4][R2.64], R4 ;             /* 0x0000000402047981 */
        /*0040*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;         /* 0x0000000402047981 */
        /*0050*/                   FFMA R4, R8, R12, R4 ;                       /* 0x0000000402047981 */
        /*0060*/                   FFMA.FTZ R4, R8, R12, R4 ;                   /* 0x0000000402047981 */
        /*0070*/                   STL.64 [R1], R4 ;                            /* 0x0000000402047981 */
		Function : _ZN7sn_fast6secondENS_1PE
        /*0000*/                   LDS.128 R4, [R2] ;                           /* 0x0000000402047981 */
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;                     /* 0x0000000402047981 */
"""

FIRST, SECOND = "_ZN7sn_fast5firstENS_1PE", "_ZN7sn_fast6secondENS_1PE"


def test_ptxas() -> None:
    kernels = machine_code.parse_ptxas(PTXAS, "90")
    assert list(kernels) == [FIRST, SECOND]
    first, second = kernels.values()
    assert (first.registers, first.stack, first.spill_stores, first.spill_loads) == (64, 16, 24, 32)
    assert (first.shared, first.arch) == (4096, "90")
    assert (second.registers, second.spill_stores, second.shared) == (40, 0, 0)


def test_resources_of_every_architecture() -> None:
    kernels = machine_code.parse_resources(RESOURCES)
    assert [(k.arch, k.registers, k.stack, k.shared) for k in kernels.values()] == [
        ("80", 40, 0, 512),
        ("90", 38, 8, 512),
    ]
    assert all(k.spill_stores is None for k in kernels.values())


def test_threads() -> None:
    assert machine_code.parse_threads(ELF) == {("90", FIRST): 512}


def test_instructions() -> None:
    counts = machine_code.parse_sass(SASS)
    assert counts["90", FIRST] == {
        **{"LDG.128": 1, "STG.128": 1, "LDS.128": 0, "HMMA": 1},
        **{"FFMA": 2, "LDL": 0, "STL": 1},
    }
    assert counts["90", SECOND]["LDS.128"] == 1


@pytest.mark.parametrize(
    ("arch", "registers", "threads", "shared", "wanted"),
    [
        ("90", 32, 1024, 0, 1.0),  # two blocks
        ("90", 33, 1024, 0, 0.5),  # 40 registers as allocated: one
        ("90", 168, 128, 0, 12 / 64),  # three blocks of four warps
        ("90", 32, 256, 100 * 1024, 16 / 64),  # shared memory: two
        ("80", 32, 256, 100 * 1024, 8 / 64),
        ("86", 32, 1024, 0, 32 / 48),
        ("90", 32, 32, 0, 0.5),  # 32 blocks
        ("90", 32, 0, 0, 0.0),
    ],
)
def test_occupancy(arch: str, registers: int, threads: int, shared: int, wanted: float) -> None:
    assert machine_code.occupancy(arch, registers, threads, shared) == wanted


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("sn_fast::power_step_finish(sn_fast::FinishParams)", "power_step_finish"),
        ("void sn_fast::pgd_step_sample<(sn_fast::Norm)1, true>(sn_fast::PgdStep)", "pgd_step_sample<1, true>"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert machine_code.short_name(name) == short


def test_names_without_a_demangler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code.shutil, "which", lambda name: None)
    assert machine_code.demangled([FIRST, SECOND]) == {FIRST: "first", SECOND: "second"}


def complete() -> list[Kernel]:
    """Kernels in which nothing is missing."""
    names = {
        "power_step_half<0>": "power_step_half<0>",
        "power_step_half<[123]>": "power_step_half<1>",
        "normalize_weights": "normalize_weights",
        "normalize_backward_gradient": "normalize_backward_gradient",
        "normalize_backward_dot": "normalize_backward_dot",
        "pgd_step_(inf|held|apply)|wrm_step|random_start": "wrm_step_chunk",
        "pgd_step_(l2_sums|l1_gradient|l1_distance)": "pgd_step_l2_sums",
        "pgd_step_(l2_)?sample": "pgd_step_l2_sample",
    }
    return [
        Kernel(names[pattern], "90", 32, 0, 0, 0, 0, 256, dict.fromkeys(wanted, 1))
        for pattern, wanted in machine_code.EXPECTED.items()
    ]


def test_faults() -> None:
    kernels = complete()
    assert machine_code.faults(kernels) == []
    kernels[0].instructions["FFMA"] = 0
    kernels[1].spill_loads = 4
    kernels[2].instructions["STL"] = 1
    found = machine_code.faults(kernels[:-1])
    assert found[0] == "power_step_half<0>, sm_90: no FFMA"
    assert [f.split(": ")[1] for f in found[1:3]] == ["spills to local memory"] * 2
    assert found[3].startswith(f"no kernel is called {list(machine_code.EXPECTED)[-1]}")


def test_document(tmp_path: Path) -> None:
    path = tmp_path / "document.md"
    path.write_text(f"before\n{machine_code.BEGIN}\nold\n{machine_code.END}\nafter\n")
    for _ in range(2):
        machine_code.write_document(path, machine_code.table(complete()))
        text = path.read_text()
        assert text.startswith(f"before\n{machine_code.BEGIN}\n\n| kernel |")
        assert text.endswith(f"| 0 |\n\n{machine_code.END}\nafter\n")
        assert "old" not in text
    assert "| `power_step_half<0>` | 90 | 256 | 32 | 0 / 0 | 0 | 0 | 100% | 1 | 0 | 1 | 0 | 1 | 0 | 0 |" in text


@pytest.mark.slow
def test_every_kernel_is_as_expected(capsys: pytest.CaptureFixture[str]) -> None:
    sys.path.insert(0, str(machine_code.ROOT / "build_tools"))
    import cuda_build

    toolkit, _ = cuda_build.find_toolkit(os.environ)
    if toolkit is None or machine_code.find_tool("cuobjdump", toolkit.home) is None:
        pytest.skip("no CUDA toolkit, or no cuobjdump")
    status = machine_code.main(["--archs", "90", "--no-docs"])
    assert status == 0, capsys.readouterr().out[-3000:]
