"""Check the files of a release: what they hold, how an index will show them, and that they install and run.

    python tools/check_release.py dist

Each wheel that fits this Python, and the sdist, is installed in a fresh environment that has torch and whatever else is
installed here, but not sn_fast. Needs twine, torch and numpy; pytest, if the tests of the sdist are to be started.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IN_SDIST = [
    *(".ci/run", ".github/workflows/tests.yml", "conda/meta.yaml", "mkdocs.yml", "pyproject.toml", "setup.py"),
    *("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md"),
    *("benchmarks/peers.py", "build_tools/cuda_build.py", "csrc/bindings.cpp", "examples/true_norms.py"),
    *("docs/index.md", "docs/figures/norm_in_use.png", "docs/results/digits_five_seeds.json", "sn_fast/py.typed"),
    *("tests/conftest.py", "tests/docs/pages.py", "tools/check_release.py"),
]
IN_WHEEL = ["sn_fast/__init__.py", "sn_fast/experiments/reproduction/published.json", "sn_fast/py.typed"]
RELATIVE_LINK = re.compile(r"\]\((?!https?:|mailto:|#)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the sdist and the wheels")
    folder = parser.parse_args().folder.resolve()
    wheels, (sdist,) = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    run([sys.executable, "-m", "twine", "check", "--strict", *map(str, (sdist, *wheels))])
    version = check_sdist(sdist)
    for wheel in wheels:
        check_wheel(wheel, version)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        shared = dependencies(work / "shared")
        for file in (*filter(fits, wheels), sdist):
            check_install(file, version, work / file.name, shared)
        if importlib.util.find_spec("pytest"):
            with tarfile.open(sdist) as archive:
                archive.extractall(work / "sdist", filter="data")
            (source,) = (work / "sdist").iterdir()
            python = work / sdist.name / "bin" / "python"
            # From the unpacked folder's tests, with the installed package.
            os.rename(source / "sn_fast", source / "not_this_one")
            run([str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_import.py"], cwd=source)
    print("all good")


def check_sdist(path: Path) -> str:
    """The version that its metadata gives."""
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        (info,) = (n for n in archive.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", n))
        metadata = archive.extractfile(info).read().decode()  # type: ignore[union-attr]
    missing = [name for name in IN_SDIST if name not in names]
    assert not missing, f"{path.name} lacks {missing}"
    waste = [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith(("build/", "runs/"))]
    assert not waste, f"{path.name} holds {waste}"
    return check_metadata(path, metadata)


def check_wheel(path: Path, version: str) -> None:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (info,) = (n for n in names if n.endswith(".dist-info/METADATA"))
        assert check_metadata(path, archive.read(info).decode()) == version, f"{path.name} is of another version"
    assert all(name in names for name in IN_WHEEL), path.name
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not re.fullmatch(r"sn_fast(-.*|\.libs)?", top)} == set(), f"{path.name}: {tops}"
    compiled = [name for name in names if name.startswith("sn_fast/_C")]
    assert len(compiled) == (0 if path.name.endswith("-none-any.whl") else 1), f"{path.name}: {compiled}"


def check_metadata(path: Path, metadata: str) -> str:
    found = re.search(RELATIVE_LINK, metadata)
    assert not found, f"{path.name}: a relative link in the description: {metadata[found.start() :][:60]}"
    version = re.search(r"^Version: (.*)$", metadata, re.MULTILINE)
    assert version is not None
    return version[1].strip()


def fits(wheel: Path) -> bool:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return wheel.name.endswith("-none-any.whl") or (f"-{tag}-" in wheel.name and sys.platform == "linux")


def dependencies(folder: Path) -> Path:
    """A folder of links to what is installed here, without sn_fast and what installs."""
    folder.mkdir()
    for site in (place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")):
        for path in Path(site).iterdir():
            own = re.match(r"sn[_-]fast|__editable__|pip\b|setuptools|distutils|_distutils|.*\.pth$", path.name)
            if not own and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return folder


def check_install(file: Path, version: str, home: Path, shared: Path) -> None:
    """Install it in a fresh environment, and use it from an empty folder."""
    run([sys.executable, "-m", "venv", str(home)])
    python = str(home / "bin" / "python")
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    Path(site, "shared.pth").write_text(f"{shared}\n")
    run([python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", str(file)], SN_FAST_CUDA="0")
    empty = home / "empty"
    empty.mkdir()
    info = subprocess.run([str(home / "bin" / "sn-fast"), "info", "--json"], cwd=empty, capture_output=True, check=True)
    facts = json.loads(info.stdout)
    assert facts["sn_fast"] == version, facts
    print(f"{file.name}: {facts['kernels']}", flush=True)
    for number, code in enumerate(blocks_of_readme()):
        (empty / f"block{number}.py").write_text(code)
        run([python, f"block{number}.py"], cwd=empty)


def blocks_of_readme() -> Iterator[str]:
    yield from re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def run(command: list[str], cwd: Path | None = None, **environment: str) -> None:
    print("+", " ".join(command), flush=True)
    subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, check=True)


if __name__ == "__main__":
    main()
