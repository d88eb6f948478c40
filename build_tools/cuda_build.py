"""Finds the CUDA toolkit and compiles ``csrc/`` with ninja; no torch, no setuptools. docs/building.md says what to set.

It stays out of the installed package. ``setup.py`` is the caller.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_ARCHS = "8.0 9.0+PTX"
LOWEST = (8, 0)  # the kernels use instructions of sm_80: cp.async, bf16 and tf32 mma


class BuildError(Exception):
    """A build that must not end in an install without kernels."""


class Arch(NamedTuple):
    """One GPU architecture: machine code for it, and with ``ptx`` also code that newer GPUs compile when they load."""

    major: int
    minor: int
    suffix: str = ""
    ptx: bool = False

    def __str__(self) -> str:
        name = f"{self.major}.{self.minor}{self.suffix}"
        return f"{name} {name}+PTX" if self.ptx else name

    @property
    def flag(self) -> str:
        """nvcc's option for it."""
        code = f"{self.major}{self.minor}{self.suffix}"
        return f"-gencode=arch=compute_{code},code=" + (f"[sm_{code},compute_{code}]" if self.ptx else f"sm_{code}")


class Toolkit(NamedTuple):
    """A CUDA toolkit: ``bin/nvcc`` and the headers, and the libraries if they lie in its own folders."""

    home: Path
    include: Path
    lib: Path | None

    @property
    def nvcc(self) -> Path:
        """The compiler."""
        return self.home / "bin" / "nvcc"

    @property
    def version(self) -> str:
        """Such as "13.0"."""
        found = re.search(r"release (\d+\.\d+)", _ask(self.nvcc, "--version"))
        if not found:
            raise BuildError(f"{self.nvcc} --version names no release")
        return found[1]

    def supported(self) -> set[tuple[int, int]]:
        """Architectures that this nvcc compiles for."""
        codes = re.findall(r"compute_(\d+)(\d)\b", _ask(self.nvcc, "--list-gpu-arch"))
        return {(int(major), int(minor)) for major, minor in codes}


class Plan(NamedTuple):
    """What this install does: build with ``toolkit``, or do without for the reason in ``why_not``."""

    toolkit: Toolkit | None
    why_not: str = ""
    required: bool = False


def plan(env: Mapping[str, str]) -> Plan:
    """Decide, from SN_FAST_CUDA (0: no kernels; 1: kernels or an error; unset: kernels if a toolkit is found)."""
    wish = env.get("SN_FAST_CUDA", "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"SN_FAST_CUDA={wish} will not do: 0 (no kernels), 1 (kernels or an error), or unset")
    if wish == "0":
        return Plan(None, "SN_FAST_CUDA=0")
    if sys.platform != "linux":
        return Plan(None, "kernels are built on Linux only", wish == "1")
    toolkit, refused = find_toolkit(env)
    if toolkit:
        return Plan(toolkit)
    return Plan(None, "; ".join(["no CUDA toolkit found", *refused]), wish == "1")


def find_toolkit(
    env: Mapping[str, str], usual: Path = Path("/usr/local/cuda"), site: Path | None = None
) -> tuple[Toolkit | None, list[str]]:
    """The first toolkit of $CUDA_HOME, $CUDA_PATH, nvcc on PATH, ``usual`` and pip's; and why others were refused."""
    refused: list[str] = []
    for name, home in _candidates(env, usual, site or Path(sysconfig.get_path("purelib"))):
        toolkit = toolkit_at(home)
        if toolkit:
            return toolkit, refused
        if name:
            refused.append(f"{name} ({home}) lacks bin/nvcc or include/cuda_runtime.h")
    return None, refused


def toolkit_at(home: Path) -> Toolkit | None:
    """The toolkit in ``home``, which counts only with compiler and headers: an nvcc alone may be a wrapper script."""
    if not os.access(home / "bin" / "nvcc", os.X_OK):
        return None
    targets = sorted(home.glob("targets/*-linux"))
    include = [p for p in (home / "include", *(t / "include" for t in targets)) if (p / "cuda_runtime.h").is_file()]
    folders = (home / "lib64", home / "lib", *(target / "lib" for target in targets))
    lib = [folder for folder in folders if (folder / "libcudart_static.a").is_file()]
    return Toolkit(home, include[0], lib[0] if lib else None) if include else None


def _candidates(env: Mapping[str, str], usual: Path, site: Path) -> Iterable[tuple[str, Path]]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(variable):
            yield f"${variable}", Path(env[variable])
    nvcc = shutil.which("nvcc", path=env.get("PATH", ""))
    if nvcc:
        home = Path(nvcc).resolve().parent.parent
        yield "", home
        if not toolkit_at(home):  # a script that calls the real one, which says where it lives
            process = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
            top = re.search(r"^#\$ TOP=(.+)$", process.stderr + process.stdout, re.MULTILINE)
            yield "nvcc on PATH", Path(top[1].strip()).resolve() if top else home
    yield "", usual
    for home in sorted(site.glob("nvidia/cu[0-9]*"), reverse=True):  # pip install nvidia-cuda-nvcc and what it needs
        yield "", home


def parse_archs(text: str) -> list[Arch]:
    """``"8.0 9.0+PTX"``, ``"8.0;9.0"``, ``"80,90a"``: architectures in ascending order, each once."""
    found: dict[tuple[int, int, str], bool] = {}
    for word in re.split(r"[\s;,]+", text.strip(" ;,\t\n")):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+ptx)?", word.lower())
        if not match:
            raise BuildError(f"{word!r} is no architecture: write them as in {DEFAULT_ARCHS!r} or '80;90a'")
        key = (int(match[1]), int(match[2]), match[3])
        found[key] = found.get(key, False) or bool(match[4])
    return [Arch(*key, ptx) for key, ptx in sorted(found.items())]


def choose_archs(env: Mapping[str, str], supported: set[tuple[int, int]]) -> tuple[list[Arch], list[str]]:
    """Architectures to build, and what to say about it.

    What SN_FAST_CUDA_ARCHS asks for is built or refused. TORCH_CUDA_ARCH_LIST speaks to every package, so that what is
    too old for the kernels or unknown to this nvcc is left out of it.
    """
    name = next((n for n in ("SN_FAST_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST") if env.get(n, "").strip()), "the default")
    wanted = parse_archs(env.get(name, DEFAULT_ARCHS))
    usable = [arch for arch in wanted if arch[:2] >= LOWEST and arch[:2] in supported]
    left_out = " ".join(str(arch) for arch in wanted if arch not in usable)
    reason = f"{left_out} of {name}: the kernels need 8.0 or newer, and this nvcc compiles for " + " ".join(
        f"{major}.{minor}" for major, minor in sorted(supported)
    )
    if not usable or (left_out and name == "SN_FAST_CUDA_ARCHS"):
        raise BuildError(f"cannot build for {reason}; set SN_FAST_CUDA_ARCHS, or SN_FAST_CUDA=0 for no kernels")
    if name == "the default" and not any(arch.ptx for arch in usable):  # an nvcc older than the last of the default
        usable[-1] = usable[-1]._replace(ptx=True)
    return usable, [f"left out: {reason}"] if left_out else []


def build(toolkit: Toolkit, target: Path, version: str, env: Mapping[str, str], root: Path = ROOT) -> None:
    """Compile ``root/csrc`` to ``target``. Objects stay in ``root/build``, so that the next build is incremental."""
    import ninja  # from the build requirements, as pybind11 below; the rest of this file works without either

    archs, notes = choose_archs(env, toolkit.supported())
    names = " ".join(map(str, archs))
    print(f"sn_fast: CUDA kernels for {names}, CUDA {toolkit.version} in {toolkit.home}", flush=True)
    for note in (*notes, *find_toolkit(env)[1]):
        print(f"sn_fast: {note}", flush=True)
    # Relative, as ninja runs in root: the folder's own name may contain spaces.
    folder = Path("build", f"csrc-{sys.implementation.cache_tag}")
    (root / folder).mkdir(parents=True, exist_ok=True)
    jobs = int(env.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    (root / folder / "build.ninja").write_text(ninja_file(toolkit, archs, version, env, root, folder, jobs))
    command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(folder / "build.ninja"), "-j", str(jobs)]
    if subprocess.run(command, cwd=root).returncode:
        raise BuildError(
            f"csrc/ does not compile with the CUDA toolkit in {toolkit.home} (see above). "
            "SN_FAST_CUDA=0 installs without kernels."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(root / folder / "_C.so", target)


def ninja_file(
    toolkit: Toolkit, archs: list[Arch], version: str, env: Mapping[str, str], root: Path, folder: Path, jobs: int
) -> str:
    """The text of build.ninja: one object for each source, all architectures of a kernel in one call of nvcc."""
    import pybind11

    # The kernels are told the CUDA version only so that a new toolkit in the old place compiles them again.
    common = ["-std=c++17", "-O3", "-Icsrc", f'-DSN_FAST_CUDA_VERSION="{toolkit.version}"']
    nvcc = [str(toolkit.nvcc), *common, "-Xcompiler", "-fPIC,-fvisibility=hidden", *(arch.flag for arch in archs)]
    kernels = sorted((root / "csrc").rglob("*.cu"))
    if 2 * len(kernels) <= jobs:  # two architectures at a time, where there are cores for it
        nvcc += ["--threads", "2"]
    compiler = shlex.split(env.get("CXX") or "g++")
    system = (pybind11.get_include(), sysconfig.get_path("include"), str(toolkit.include))
    cxx = [*compiler, *common, "-fPIC", "-fvisibility=hidden", *(f"-isystem{path}" for path in system)]
    cxx += [f'-DSN_FAST_ARCHS="{" ".join(map(str, archs))}"', f'-DSN_FAST_VERSION="{version}"']
    # exclude-libs: another CUDA runtime in the process (torch's) must not take the place of ours.
    link = ["-Wl,--exclude-libs,ALL", "-s", *([f"-L{toolkit.lib}"] if toolkit.lib else [])]
    libraries = "-lcudart_static -ldl -lrt -lpthread"
    lines = [
        f"builddir = {folder}",
        *_rule("nvcc", f"{_shell(nvcc)} -MD -MF $out.d -c $in -o $out", depfile=True),
        *_rule("cxx", f"{_shell(cxx)} -MD -MF $out.d -c $in -o $out", depfile=True),
        *_rule("link", f"{_shell(compiler)} -shared -o $out $in {_shell(link)} {libraries}"),
    ]
    objects = []
    for source in [root / "csrc" / "bindings.cpp", *kernels]:
        relative = source.relative_to(root)
        objects.append(f"{folder / relative}.o")
        lines.append(f"build {objects[-1]}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {relative}")
    return "\n".join([*lines, f"build {folder / '_C.so'}: link {' '.join(objects)}", ""])


def _rule(name: str, command: str, depfile: bool = False) -> list[str]:
    headers = ["  depfile = $out.d", "  deps = gcc"] if depfile else []
    return [f"rule {name}", f"  command = {command}", f"  description = {name} $out", *headers]


def _shell(words: Iterable[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _ask(nvcc: Path, option: str) -> str:
    process = subprocess.run([str(nvcc), option], capture_output=True, text=True)
    if process.returncode:
        raise BuildError(f"{nvcc} {option} fails: {(process.stderr or process.stdout).strip()}")
    return process.stdout
