"""What the build decides, and what the installed package says about it. The toolkits here are small shell scripts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from sn_fast import info
from sn_fast.ops import compiled, library

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "build_tools"))
import cuda_build  # noqa: E402

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.131"; exit ;;
--list-gpu-arch) echo "compute_75\ncompute_80\ncompute_86\ncompute_90\ncompute_100"; exit ;;
esac
while [ "$#" -gt 0 ]; do
    case "$1" in -o) out=$2 ;; -MF) deps=$2 ;; -c) source=$2 ;; esac
    shift
done
echo "$source" >> log
[ -f "$source" ] && grep -q broken "$source" && { echo "$source: broken"; exit 1; }
[ -z "$deps" ] || echo "$out: $source csrc/kernel.cuh" > "$deps"
echo object > "$out"
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolkit(home: Path, include: str = "include", lib: str = "lib64") -> Path:
    script(home / "bin" / "nvcc", NVCC)
    for name in (f"{include}/cuda_runtime.h", f"{lib}/libcudart_static.a"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    return home


@pytest.fixture
def nowhere(tmp_path):
    """Where nothing is installed."""
    return {"usual": tmp_path / "usual", "site": tmp_path / "site"}


def labels(archs):
    return " ".join(map(str, archs))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0 9.0+PTX", "8.0 9.0 9.0+PTX"),
        ("8.0;9.0", "8.0 9.0"),
        ("90, 80", "8.0 9.0"),
        ("80;90a", "8.0 9.0a"),
        ("8.0 9.0 9.0+PTX", "8.0 9.0 9.0+PTX"),  # its own output
        ("100 12.0f 12.1+ptx", "10.0 12.0f 12.1 12.1+PTX"),
        (" 8.6; ", "8.6"),
    ],
)
def test_archs_are_read_in_every_spelling(text, expected):
    assert labels(cuda_build.parse_archs(text)) == expected
    assert labels(cuda_build.parse_archs(expected)) == expected


@pytest.mark.parametrize("text", ["Hopper", "8.0 9", "sm_90", "9.0+", "9.0b"])
def test_other_words_are_refused(text):
    with pytest.raises(cuda_build.BuildError, match=r"is no architecture: write them as in '8.0 9.0\+PTX'"):
        cuda_build.parse_archs(text)


def test_flags_of_nvcc():
    flags = [arch.flag for arch in cuda_build.parse_archs("8.0 9.0+PTX 90a 100")]
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
    ]


CUDA_13 = {(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)}
CUDA_11 = {(7, 0), (7, 5), (8, 0), (8, 6)}


@pytest.mark.parametrize(
    ("env", "supported", "expected", "says"),
    [
        ({}, CUDA_13, "8.0 9.0 9.0+PTX", ""),
        ({"SN_FAST_CUDA_ARCHS": " "}, CUDA_13, "8.0 9.0 9.0+PTX", ""),
        ({}, CUDA_11, "8.0 8.0+PTX", "left out: 9.0 9.0+PTX of the default"),
        ({"TORCH_CUDA_ARCH_LIST": "8.6"}, CUDA_13, "8.6", ""),
        ({"TORCH_CUDA_ARCH_LIST": "7.0;7.5;8.0;13.0"}, CUDA_13, "8.0", "left out: 7.0 7.5 13.0 of TORCH_CUDA_ARCH"),
        ({"TORCH_CUDA_ARCH_LIST": "8.6", "SN_FAST_CUDA_ARCHS": "90a"}, CUDA_13, "9.0a", ""),
    ],
)
def test_choice_of_archs(env, supported, expected, says):
    archs, notes = cuda_build.choose_archs(env, supported)
    assert labels(archs) == expected
    assert says in "".join(notes)
    assert bool(says) == bool(notes)


@pytest.mark.parametrize(
    ("env", "supported"),
    [
        ({"SN_FAST_CUDA_ARCHS": "7.5 8.0"}, CUDA_13),
        ({"SN_FAST_CUDA_ARCHS": "8.0 9.0"}, CUDA_11),
        ({"TORCH_CUDA_ARCH_LIST": "7.5"}, CUDA_13),
        ({}, {(10, 0)}),
    ],
)
def test_archs_that_cannot_be_built_are_an_error(env, supported):
    with pytest.raises(cuda_build.BuildError, match=r"cannot build for .* 8.0 or newer, and this nvcc compiles for \d"):
        cuda_build.choose_archs(env, supported)


def test_order_of_the_toolkits(tmp_path, nowhere):
    pip = toolkit(nowhere["site"] / "nvidia" / "cu13", lib="lib")
    places = [toolkit(tmp_path / name) for name in ("home", "path", "on_path")] + [toolkit(nowhere["usual"]), pip]
    env = {"CUDA_HOME": str(places[0]), "CUDA_PATH": str(places[1]), "PATH": str(places[2] / "bin")}
    for place, variable in zip(places, (*env, "", "")):
        found, refused = cuda_build.find_toolkit(env, **nowhere)
        assert found is not None
        assert (found.home, found.include, found.version) == (place, place / "include", "12.4")
        assert found.lib == place / ("lib" if place == pip else "lib64")
        assert refused == []
        env.pop(variable, None)
        shutil.rmtree(place)
    assert cuda_build.find_toolkit(env, **nowhere) == (None, [])


def test_toolkit_behind_a_link_and_in_folders_of_a_target(tmp_path, nowhere):
    home = toolkit(tmp_path / "real", include="targets/sbsa-linux/include", lib="targets/sbsa-linux/lib")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    found, _ = cuda_build.find_toolkit({"PATH": str(tmp_path / "bin")}, **nowhere)
    folder = home / "targets" / "sbsa-linux"
    assert found == cuda_build.Toolkit(home, folder / "include", folder / "lib")


def test_toolkit_behind_a_script(tmp_path, nowhere):
    home = toolkit(tmp_path / "real one")
    wrapper = tmp_path / "local" / "bin" / "nvcc"
    script(wrapper, f"#!/bin/sh\necho '#$ _HERE_=x' >&2\necho '#$ TOP={home}/bin/..' >&2\n")
    env = {"PATH": str(wrapper.parent)}
    found, refused = cuda_build.find_toolkit(env, **nowhere)
    assert found is not None
    assert (found.home, refused) == (home, [])
    script(wrapper, "#!/bin/sh\nexit 1\n")
    found, refused = cuda_build.find_toolkit(env, **nowhere)
    assert found is None
    assert refused == [f"nvcc on PATH ({tmp_path / 'local'}) lacks bin/nvcc or include/cuda_runtime.h"]


def test_a_home_that_is_none_is_named_and_passed_over(tmp_path, nowhere):
    toolkit(nowhere["usual"])
    (tmp_path / "home" / "bin").mkdir(parents=True)
    found, refused = cuda_build.find_toolkit({"CUDA_HOME": str(tmp_path / "home"), "PATH": ""}, **nowhere)
    assert found is not None
    assert found.home == nowhere["usual"]
    assert refused == [f"$CUDA_HOME ({tmp_path / 'home'}) lacks bin/nvcc or include/cuda_runtime.h"]


def test_plan(monkeypatch, tmp_path):
    home = str(toolkit(tmp_path))
    assert cuda_build.plan({"SN_FAST_CUDA": "0", "CUDA_HOME": home}) == (None, "SN_FAST_CUDA=0", False)
    assert cuda_build.plan({"CUDA_HOME": home}).toolkit is not None
    with pytest.raises(cuda_build.BuildError, match="SN_FAST_CUDA=yes will not do"):
        cuda_build.plan({"SN_FAST_CUDA": "yes"})
    monkeypatch.setattr(cuda_build, "find_toolkit", lambda env: (None, ["$CUDA_HOME (x) lacks"]))
    assert cuda_build.plan({}) == (None, "no CUDA toolkit found; $CUDA_HOME (x) lacks", False)
    assert cuda_build.plan({"SN_FAST_CUDA": "1"}).required
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cuda_build.plan({"CUDA_HOME": home}) == (None, "kernels are built on Linux only", False)


def _environment():
    return {name: value for name, value in os.environ.items() if "CUDA_ARCH" not in name}


@pytest.fixture
def tree(tmp_path):
    """A package of two sources and a header, in a folder with a space; calls of the compilers are lines in ``log``."""
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    root = tmp_path / "a tree"
    (root / "csrc" / "deep").mkdir(parents=True)
    for name in ("bindings.cpp", "deep/kernel.cu", "kernel.cuh"):
        (root / "csrc" / name).touch()
    found = cuda_build.toolkit_at(toolkit(tmp_path / "cuda"))
    env = _environment() | {"CXX": str(found.nvcc), "MAX_JOBS": "1"}
    target = root / "out" / "_C.so"

    def build(**more):
        (root / "log").write_text("")
        cuda_build.build(found, target, "1.2.3", env | more, root)
        return sorted((root / "log").read_text().split())

    return SimpleNamespace(root=root, build=build, target=target)


def test_builds_are_incremental_and_follow_headers_archs_and_sources(tree, capfd):
    everything = ["csrc/bindings.cpp", "csrc/deep/kernel.cu"]
    assert tree.build() == everything
    assert tree.target.read_text() == "object\n"
    assert "sn_fast: CUDA kernels for 8.0 9.0 9.0+PTX, CUDA 12.4 in" in capfd.readouterr().out
    assert tree.build() == []
    header = tree.root / "csrc" / "kernel.cuh"
    os.utime(header, ns=((tree.root / "log").stat().st_mtime_ns + 1,) * 2)
    assert tree.build() == everything
    assert tree.build(SN_FAST_CUDA_ARCHS="8.0") == everything
    (tree.root / "csrc" / "new.cu").touch()
    assert tree.build(SN_FAST_CUDA_ARCHS="8.0") == ["csrc/new.cu"]


def test_what_the_compilers_are_told(tree, tmp_path):
    tree.build()
    [path] = tree.root.glob("build/*/build.ninja")
    nvcc, cxx, link = (line for line in path.read_text().splitlines() if line.startswith("  command"))
    for flag in ("-std=c++17", "-O3", "-Icsrc", "-fvisibility=hidden", "-fPIC", "-MD -MF $out.d"):
        assert flag in nvcc
        assert flag in cxx
    for name, value in (("ARCHS", "8.0 9.0 9.0+PTX"), ("CUDA_VERSION", "12.4"), ("VERSION", "1.2.3")):
        assert f"'-DSN_FAST_{name}=\"{value}\"'" in cxx
    assert "--threads" not in nvcc  # as MAX_JOBS is 1
    tree.build(MAX_JOBS="2")
    assert "--threads 2" in path.read_text()
    assert f"-isystem{tmp_path / 'cuda' / 'include'}" in cxx
    assert f"-L{tmp_path / 'cuda' / 'lib64'} -lcudart_static -ldl -lrt -lpthread" in link


def test_sources_that_do_not_compile_are_an_error(tree, capfd):
    (tree.root / "csrc" / "bad.cu").write_text("broken")
    with pytest.raises(cuda_build.BuildError, match=r"csrc/ does not compile .* SN_FAST_CUDA=0 installs without"):
        tree.build()
    assert "csrc/bad.cu: broken" in capfd.readouterr().out
    assert not tree.target.exists()


def test_an_nvcc_that_does_not_run_is_an_error(tmp_path):
    found = cuda_build.toolkit_at(toolkit(tmp_path))
    script(found.nvcc, "#!/bin/sh\necho no licence >&2; exit 1\n")
    with pytest.raises(cuda_build.BuildError, match="nvcc --version fails: no licence"):
        _ = found.version


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """An installed package, empty but for what a test puts into it."""
    name = f"installed_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / name


def test_not_built(package):
    module, status = compiled.load(f"{package.name}._C", "1.0")
    assert (module, status) == (None, "not built: pure-Python install (no kernels were compiled here)")
    (package / "_not_built.txt").write_text("SN_FAST_CUDA=0")
    assert compiled.load(f"{package.name}._C", "1.0")[1] == "not built: pure-Python install (SN_FAST_CUDA=0)"


def test_built_but_will_not_load(package):
    (package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("no library")
    module, status = compiled.load(f"{package.name}._C", "1.0")
    assert module is None
    assert status.startswith("built but will not load: ")
    assert "_C" in status.removeprefix("built but will not load: ")  # the loader's own words


def test_built_for_another_python(package):
    (package / "_C.cpython-34m-x86_64-linux-gnu.so").touch()
    module, status = compiled.load(f"{package.name}._C", "1.0")
    assert module is None
    assert status.startswith("built but will not load: _C.cpython-34m-x86_64-linux-gnu.so is not for this Python 3.")


def test_loads_only_its_own_version(package):
    (package / "_C.py").write_text("version, archs, cuda_version = '1.0', '8.0 9.0 9.0+PTX', '13.0'")
    module, status = compiled.load(f"{package.name}._C", "1.0")
    assert module is sys.modules[f"{package.name}._C"]
    assert status == "CUDA kernels for 8.0 9.0 9.0+PTX, built with CUDA 13.0"
    module, status = compiled.load(f"{package.name}._C", "1.1")
    assert (module, status) == (None, "built but will not load: it is of sn_fast 1.0, and this is 1.1")


def test_what_will_not_load_is_warned_about_once_and_shown_by_info(tmp_path):
    copy = tmp_path / "sn_fast"
    shutil.copytree(ROOT / "sn_fast", copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (copy / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("no library")
    run = subprocess.run(
        [sys.executable, "-m", "sn_fast", "info", "--json"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    facts = json.loads(run.stdout)
    assert facts["kernels"].startswith("built but will not load: ")
    assert facts["backend"] == "plain PyTorch on every device"
    assert run.stderr.count("UserWarning") == 1
    for part in (f"sn_fast {facts['sn_fast']} runs without its CUDA kernels", facts["kernels"], "reinstall sn_fast"):
        assert part in run.stderr


@pytest.mark.parametrize(
    ("archs", "runs_on", "not_on"),
    [
        ("8.0 9.0 9.0+PTX", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 1)], [(7, 5)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("9.0a", [(9, 0)], [(10, 0), (8, 0)]),
        ("10.0f", [(10, 0), (10, 3)], [(12, 0)]),
        ("CPU emulation", [], [(9, 0)]),
    ],
)
def test_gpus_that_kernels_run_on(archs, runs_on, not_on):
    assert all(compiled.covers(archs, capability) for capability in runs_on)
    assert not any(compiled.covers(archs, capability) for capability in not_on)


def test_info_says_what_the_gpu_and_the_driver_lack(monkeypatch):
    class Driver:
        @staticmethod
        def cuDriverGetVersion(number):
            number._obj.value = 12040
            return 0

    monkeypatch.setattr(compiled, "MODULE", SimpleNamespace(archs="8.0 9.0", cuda_version="13.0"))
    monkeypatch.setattr("ctypes.CDLL", lambda name: Driver)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "T4")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr("sn_fast.ops.library._SERVED", {})  # the kernels of this install, which would warn once
    facts = info()
    assert facts["gpu"] == "T4, compute capability 7.5: the kernels are not for it (built for 8.0 9.0)"
    assert facts["driver"] == "up to CUDA 12.4: too old for kernels built with CUDA 13.0"


@pytest.mark.parametrize(
    ("driver", "capability", "found"),
    [
        ((13, 0), (9, 0), None),
        ((13, 2), (9, 0), None),
        (None, (9, 0), None),  # not told: torch has found a GPU all the same
        ((12, 4), (9, 0), r"for CUDA 13.1, but the driver here supports 12.4 at most. Remedy: update the driver"),
        ((13, 0), (7, 5), r"for 8.0 9.0\+PTX, but a GPU here is 7.5. Remedy: reinstall with SN_FAST_CUDA_ARCHS=7.5"),
        ((13, 1), (12, 0), None),
        ((13, 0), (12, 0), r"for CUDA 13.1, but the driver here supports 13.0 at most"),  # compiles it from PTX
    ],
)
def test_plain_pytorch_where_the_kernels_cannot_run(monkeypatch, driver, capability, found):
    monkeypatch.setattr(library, "driver_version", lambda: driver)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    served = library.UseKernels.__new__(library.UseKernels)
    served._module, served._runs = SimpleNamespace(archs="8.0 9.0+PTX", cuda_version="13.1"), None
    if found is None:
        assert served.runs()
        return
    with pytest.warns(UserWarning, match=found):
        assert not served.runs()
    assert not served.runs()  # warned once


def test_bindings_reach_no_code_that_only_nvcc_reads():
    pybind11 = pytest.importorskip("pybind11")
    found, _ = cuda_build.find_toolkit(os.environ)
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if found is None or compiler is None:
        pytest.skip("no CUDA toolkit or no C++ compiler here")
    includes = (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"), found.include)
    names = ("SN_FAST_ARCHS", "SN_FAST_CUDA_VERSION", "SN_FAST_VERSION")
    flags = ["-std=c++17", "-fsyntax-only", *(f"-I{path}" for path in includes), *(f'-D{name}=""' for name in names)]
    run = subprocess.run([compiler, *flags, ROOT / "csrc" / "bindings.cpp"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_pip_builds_in_a_fresh_environment_without_torch_also_from_the_sdist(tmp_path):
    if cuda_build.find_toolkit(os.environ)[0] is None:
        pytest.skip("no CUDA toolkit here: nothing to compile with")
    tree = tmp_path / "tree"
    kept = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=kept)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    env = _environment() | {"SN_FAST_CUDA": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    sdist = [
        *(python, "-c"),
        "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])",
        tmp_path,
    ]
    subprocess.run([python, "-m", "pip", "install", "--quiet", "setuptools>=77"], env=env, check=True)
    subprocess.run(sdist, cwd=tree, env=env, check=True, capture_output=True)
    [archive] = tmp_path.glob("sn_fast-*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    sources = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert sources | {"build_tools/cuda_build.py", "setup.py", "pyproject.toml"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]

    install = [python, "-m", "pip", "install", "--no-deps", archive]
    subprocess.run(install, env=env, check=True)
    [library] = (tmp_path / "venv").glob("lib/python*/site-packages/sn_fast/_C.*.so")
    load = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('sn_fast._C', sys.argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.version, m.archs, m.cuda_version, sep='|');"
        "print(u.find_spec('torch'))"
    )
    run = [str(python), "-c", load, library]
    out = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    version, archs, cuda = out.splitlines()[0].split("|")
    assert version == info()["sn_fast"]
    assert archs.startswith("8.0 ")
    assert archs.endswith("+PTX")
    assert cuda[0].isdigit()
    assert out.splitlines()[1] == "None"
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "cudart" not in needed
    assert "torch" not in needed
