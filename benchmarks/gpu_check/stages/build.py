"""Compiles the kernels for this GPU alone, in a copy of the sources, and checks that they load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .. import results
from ..context import Context
from ..runner import build_folder

_IGNORED = ("build", "dist", "runs", "shared", "__pycache__", "*.egg-info", "*.so", ".[!c]*")


def run(context: Context) -> None:
    """The copy stays in the folder for temporary files: later stages run in it."""
    if context.rehearse:
        from ..kernels import serve

        start = time.monotonic()
        serve(context)
        context.record("seconds", round(time.monotonic() - start, 1))
        return
    import torch

    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    tree = build_folder(results.sources_digest())
    context.record("arch", capability)
    built = tree / "built"  # written last
    if not built.exists():
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(results.ROOT, tree, ignore=shutil.ignore_patterns(*_IGNORED))
        # Line numbers for the sanitizer and the profiler; they change no instruction.
        env = os.environ | {"SN_FAST_CUDA": "1", "SN_FAST_CUDA_ARCHS": capability, "NVCC_APPEND_FLAGS": "-lineinfo"}
        start = time.monotonic()
        _build(tree, env, context)
        context.record("seconds", round(time.monotonic() - start, 1))
        built.touch()
    check = "import json, sn_fast; print(json.dumps(sn_fast.info()))"
    done = subprocess.run([sys.executable, "-c", check], cwd=tree, env=_only(tree), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"import sn_fast fails: {done.stderr[-2000:]}")
    info = json.loads(done.stdout.strip().splitlines()[-1])
    context.record("info", info)
    print(json.dumps(info, indent=1), flush=True)
    if not info["kernels"].startswith("CUDA kernels") or not info["backend"].startswith("CUDA"):
        raise RuntimeError(f"the kernels were built but are not in use: {info['kernels']}; {info['backend']}")
    context.attempt("machine code", lambda: _machine_code(tree, context))


def _build(tree: Path, env: dict[str, str], context: Context) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    print((done.stdout + done.stderr)[-3000:], flush=True)
    if done.returncode == 0:
        return
    # An old setuptools stumbles over pyproject.toml; the build itself needs none.
    context.fail(f"setup.py build_ext: {(done.stdout + done.stderr).strip()[-800:]}")
    direct = (
        "import os, sys, sysconfig; sys.path.insert(0, 'build_tools'); import cuda_build; from pathlib import Path;"
        "plan = cuda_build.plan(os.environ);"
        "name = 'sn_fast/_C' + sysconfig.get_config_var('EXT_SUFFIX');"
        "scope = {}; exec(Path('sn_fast/_version.py').read_text(), scope);"
        "cuda_build.build(plan.toolkit, Path(name).absolute(), scope['__version__'], os.environ)"
    )
    subprocess.run([sys.executable, "-c", direct], cwd=tree, env=env, check=True)


def _only(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree)}


def _machine_code(tree: Path, context: Context) -> None:
    from benchmarks import machine_code

    cuobjdump = machine_code.find_tool("cuobjdump", Path("/usr/local/cuda"))
    if cuobjdump is None:
        context.record("machine_code", "no cuobjdump")
        return
    (module,) = (tree / "sn_fast").glob("_C*.so")
    kernels = list(machine_code.read_binary(module, cuobjdump).values())
    names = machine_code.demangled(k.name for k in kernels)
    for kernel in kernels:
        kernel.name = names[kernel.name]
    wrong = machine_code.faults(kernels)
    context.record("machine_code", wrong or "as expected")
    for fault in wrong:
        context.fail(fault)
