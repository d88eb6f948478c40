"""What the compiler made of the kernels: registers, spills, occupancy and the instructions that matter.

    python -m benchmarks.machine_code                  # compiles csrc/ for 8.0 and 9.0, rewrites docs/machine_code.md
    python -m benchmarks.machine_code sn_fast/_C*.so   # reads a compiled module or object instead

Needs nvcc (for the first form) and cuobjdump, but no GPU. The exit code is 1 if a kernel spills, or lacks an
instruction that it was written for (``EXPECTED``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "machine_code.md"
BEGIN, END = "<!-- generated: python -m benchmarks.machine_code -->", "<!-- end of generated part -->"
ARCHS = ("80", "90")
INSTRUCTIONS = ("LDG.128", "STG.128", "LDS.128", "HMMA", "FFMA", "LDL", "STL")

EXPECTED = {
    "power_step_half<0>": ("LDG.128", "LDS.128", "FFMA"),  # fp32
    "power_step_half<[123]>": ("HMMA", "LDG.128", "LDS.128", "FFMA"),  # tf32, 3xtf32, bf16
    "normalize_weights": ("LDG.128", "STG.128"),
    "normalize_backward_gradient": ("HMMA", "FFMA"),
    "normalize_backward_dot": ("LDG.128",),
    "pgd_step_(inf|held|apply)|wrm_step|random_start": ("LDG.128", "STG.128"),
    "pgd_step_(l2_sums|l1_gradient|l1_distance)": ("LDG.128",),
    "pgd_step_(l2_)?sample": ("STG.128",),  # what stays in shared memory comes by cp.async
}
"""Instructions that the kernels of a name must have, by regular expression."""


@dataclass
class Kernel:
    """One kernel as compiled for one architecture. Shared memory is the static part; the rest is set at launch."""

    name: str
    arch: str
    registers: int = 0
    stack: int = 0
    spill_stores: int | None = None  # None: not told (a compiled module does not keep it)
    spill_loads: int | None = None
    shared: int = 0
    threads: int = 0  # of the largest block
    instructions: dict[str, int] = field(default_factory=dict)

    @property
    def occupancy(self) -> float:
        """Part of a multiprocessor's warps that registers, threads and static shared memory allow."""
        return occupancy(self.arch, self.registers, self.threads, self.shared)


# -- reading the tools' output ----------------------------------------------------------------------------------------


def parse_ptxas(text: str, arch: str) -> dict[str, Kernel]:
    """Kernels by mangled name, from what ``-Xptxas -v`` prints."""
    kernels: dict[str, Kernel] = {}
    kernel = Kernel("", arch)
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            kernel = kernels[entry[1]] = Kernel(entry[1], entry[2])
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernel.stack, kernel.spill_stores, kernel.spill_loads = map(int, frame.groups())
        elif used := re.search(r"Used (\d+) registers", line):
            kernel.registers = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernel.shared = int(shared[1]) if shared else 0
    return kernels


def parse_resources(text: str) -> dict[tuple[str, str], Kernel]:
    """Kernels by (architecture, mangled name), from ``cuobjdump --dump-resource-usage`` of a module or object."""
    kernels: dict[tuple[str, str], Kernel] = {}
    arch, name = "", ""
    for line in text.splitlines():
        if found := re.search(r"^\s*arch = sm_(\w+)", line):
            arch = found[1]
        elif found := re.search(r"^\s*Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            registers, stack, shared = map(int, found.groups())
            reserved = _RESERVED if int(re.sub(r"\D", "", arch) or 0) >= 90 else 0  # counted there, not before
            kernels[arch, name] = Kernel(name, arch, registers=registers, stack=stack, shared=max(0, shared - reserved))
    return kernels


def parse_threads(text: str) -> dict[tuple[str, str], int]:
    """Threads of the largest block by (architecture, mangled name), from ``cuobjdump --dump-elf``."""
    threads: dict[tuple[str, str], int] = {}
    arch, name, wanted = "", "", False
    for line in text.splitlines():
        if found := re.search(r"^\s*(?:arch = |\.target\s+)sm_(\w+)", line):
            arch = found[1]
        elif found := re.match(r"\.nv\.info\.(\S+)", line):
            name = found[1]
        elif "Attribute:" in line:
            wanted = "EIATTR_MAX_THREADS" in line
        elif wanted and "Value:" in line:
            x, y, z = (int(word, 16) for word in line.split()[1:4])
            threads[arch, name] = x * y * z
    return threads


def parse_sass(text: str) -> dict[tuple[str, str], dict[str, int]]:
    """How often each of ``INSTRUCTIONS`` occurs, by (architecture, mangled name), from ``cuobjdump --dump-sass``."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    arch, current = "", dict.fromkeys(INSTRUCTIONS, 0)
    for line in text.splitlines():
        if found := re.search(r"^\s*code for sm_(\w+)", line):
            arch = found[1]
        elif found := re.search(r"^\s*Function : (\S+)", line):
            current = counts[arch, found[1]] = dict.fromkeys(INSTRUCTIONS, 0)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            operation, *modifiers = found[1].split(".")
            name = f"{operation}.128" if "128" in modifiers else operation
            if name in current:
                current[name] += 1
    return counts


# -- occupancy --------------------------------------------------------------------------------------------------------

_RESERVED = 1024  # bytes of shared memory that a block takes for itself
_SHARED = {"80": 164, "86": 100, "87": 164, "89": 100, "90": 228, "100": 228, "103": 228, "120": 100}  # KB
_WARPS = {"80": 64, "90": 64, "100": 64, "103": 64}  # of a multiprocessor; else 48
_BLOCKS = {"86": 16, "87": 16, "89": 24, "120": 24}  # else 32


def occupancy(arch: str, registers: int, threads: int, shared: int) -> float:
    """Warps that can be resident on a multiprocessor, as a part of the most there can be; 0 if ``threads`` is 0."""
    number = arch.rstrip("af")
    if not threads or number not in _SHARED:
        return 0.0
    warps = -(-threads // 32)
    per_warp = max(256, -(-registers * 32 // 256) * 256)
    most = _WARPS.get(number, 48)
    blocks = min(
        65536 // per_warp // 4 * 4 // warps,
        _SHARED[number] * 1024 // (shared + _RESERVED),
        most // warps,
        _BLOCKS.get(number, 32),
    )
    return blocks * warps / most


# -- running the tools ------------------------------------------------------------------------------------------------


def find_tool(name: str, home: Path | None = None) -> Path | None:
    """A CUDA binary tool: of PATH, of the toolkit in ``home``, or of an installed triton package."""
    found = shutil.which(name)
    places = [Path(found)] if found else []
    if home:
        places.append(home / "bin" / name)
    triton = find_spec("triton")
    if triton and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    return next((p for p in places if os.access(p, os.X_OK)), None)


def demangled(names: Iterable[str]) -> dict[str, str]:
    """Readable names without argument lists; by c++filt, else the last identifier of the mangled name."""
    names = list(dict.fromkeys(names))
    if shutil.which("c++filt") and names:
        lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
        if len(lines) == len(names):
            return {a: short_name(b) for a, b in zip(names, lines)}
    return {name: _last_identifier(name) for name in names}


def short_name(text: str) -> str:
    """``void sn_fast::f<(sn_fast::Norm)1, true>(sn_fast::P)`` -> ``f<1, true>``."""
    text = re.sub(r"\([\w:]+\)(?=-?\d)", "", text)  # casts of template arguments
    text = re.sub(r"\(.*\)( const)?$", "", text)
    return re.sub(r"^(void )?", "", text).replace("sn_fast::", "").replace("(anonymous namespace)::", "")


def _last_identifier(mangled: str) -> str:
    name, rest = mangled, re.sub(r"^_ZN?", "", mangled)
    while found := re.match(r"(\d+)", rest):
        length = int(found[1])
        name, rest = rest[found.end() : found.end() + length], rest[found.end() + length :]
    return name


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} fails:\n{done.stderr[-4000:] or done.stdout[-4000:]}")
    return done.stdout + done.stderr


def read_binary(path: Path, cuobjdump: Path) -> dict[tuple[str, str], Kernel]:
    """Every kernel of a compiled module, object or cubin."""
    kernels = parse_resources(_run([cuobjdump, "--dump-resource-usage", path]))
    threads = parse_threads(_run([cuobjdump, "--dump-elf", path]))
    counts = parse_sass(_run([cuobjdump, "--dump-sass", path]))
    if len(archs := {arch for arch, _ in counts}) == 1:  # resources of a bare cubin come without an architecture
        (arch,) = archs
        kernels = {(arch, name): k for (_, name), k in kernels.items()}
        threads = {(arch, name): t for (_, name), t in threads.items()}
    for key, kernel in kernels.items():
        kernel.arch = key[0]
        kernel.threads, kernel.instructions = threads.get(key, 0), counts.get(key, {})
    return kernels


def compile_sources(nvcc: Path, cuobjdump: Path, archs: Sequence[str], root: Path = ROOT) -> list[Kernel]:
    """Compile every .cu of ``root/csrc`` for every architecture, and read the results."""
    sources = sorted((root / "csrc").rglob("*.cu"))

    def one(job: tuple[Path, str]) -> list[Kernel]:
        source, arch = job
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "out.cubin")
            flags = ["-std=c++17", "-O3", f"-I{root / 'csrc'}", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v"]
            told = parse_ptxas(_run([nvcc, *flags, source, "-o", cubin]), arch)
            read = {name: k for (_, name), k in read_binary(cubin, cuobjdump).items()}
        for name, kernel in told.items():
            kernel.threads, kernel.instructions = read[name].threads, read[name].instructions
        return list(told.values())

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [k for kernels in pool.map(one, [(s, a) for s in sources for a in archs]) for k in kernels]


# -- judging and showing ----------------------------------------------------------------------------------------------


def faults(kernels: Iterable[Kernel]) -> list[str]:
    """What is wrong, one sentence each: spills, local memory, instructions that are not there, kernels that are not."""
    kernels = list(kernels)
    found = []
    for k in kernels:
        if k.spill_stores or k.spill_loads or k.instructions.get("LDL") or k.instructions.get("STL"):
            found.append(f"{k.name}, sm_{k.arch}: spills to local memory")
        for pattern, wanted in EXPECTED.items():
            missing = [i for i in wanted if not k.instructions.get(i)] if re.match(pattern, k.name) else []
            if missing:
                found.append(f"{k.name}, sm_{k.arch}: no {', '.join(missing)}")
    found += [f"no kernel is called {p}" for p in EXPECTED if not any(re.match(p, k.name) for k in kernels)]
    return found


def table(kernels: Iterable[Kernel]) -> str:
    """As markdown, one line per kernel and architecture."""
    head = [
        "kernel",
        "sm",
        "threads",
        "registers",
        "spill st / ld",
        "stack",
        "static shared",
        "occupancy",
        *INSTRUCTIONS,
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * 2 + "---:|" * (len(head) - 2)]
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        spills = "not told" if k.spill_stores is None else f"{k.spill_stores} / {k.spill_loads}"
        cells = [f"`{k.name}`", k.arch, k.threads, k.registers, spills, k.stack, k.shared, f"{k.occupancy:.0%}"]
        cells += [k.instructions.get(i, 0) for i in INSTRUCTIONS]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def write_document(path: Path, generated: str) -> None:
    """Replace the generated part of a document; its words stay."""
    text = path.read_text()
    before, rest = text.split(BEGIN, 1)
    path.write_text(f"{before}{BEGIN}\n\n{generated}\n\n{END}{rest.split(END, 1)[1]}")


def sources_digest(root: Path = ROOT) -> str:
    """Of everything in csrc/ that the kernels are made from."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (root / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser("machine_code", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("binary", nargs="*", type=Path, help="compiled modules or objects; none: compile csrc/")
    parser.add_argument("--archs", default=",".join(ARCHS), help="to compile for, such as 80,90 (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/machine_code.md as it is")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(ROOT / "build_tools"))
    import cuda_build

    toolkit, _ = cuda_build.find_toolkit(os.environ)
    cuobjdump = find_tool("cuobjdump", toolkit.home if toolkit else None)
    if cuobjdump is None:
        print("no cuobjdump: install a CUDA toolkit's cuda-cuobjdump, or pip install triton", file=sys.stderr)
        return 2
    if options.binary:
        kernels = [k for path in options.binary for k in read_binary(path, cuobjdump).values()]
        heading = f"From {', '.join(path.name for path in options.binary)}."
    elif toolkit is None:
        print("no CUDA toolkit to compile with (docs/building.md); or name a compiled module", file=sys.stderr)
        return 2
    else:
        kernels = compile_sources(toolkit.nvcc, cuobjdump, options.archs.split(","))
        heading = f"CUDA {toolkit.version}, `-O3`; sources {sources_digest()}."
    names = demangled(k.name for k in kernels)
    for kernel in kernels:
        kernel.name = names[kernel.name]
    wrong = faults(kernels)
    text = "\n".join([heading, "", table(kernels), "", *(f"- **{w}**" for w in wrong or ["As expected."])])
    print(text)
    if options.json:
        rows = [asdict(k) | {"occupancy": k.occupancy} for k in kernels]
        options.json.write_text(json.dumps({"heading": heading, "kernels": rows, "faults": wrong}, indent=1))
    if not options.binary and not options.no_docs:
        write_document(DOCUMENT, text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
