"""Whatever a model, its weights or its size do: one line on stderr and exit code 2, and clean JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sn_fast.cli import main
from sn_fast.errors import UserError, failures_explained
from sn_fast.inspection import inspect_model, plot
from sn_fast.inspection.weights import quantized_layers

from ..processes import start

FACTORIES = """
import os, sys
import torch
from torch import nn

def meta():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

def meta_buffer():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[1].running_mean = torch.empty(2, device="meta")
    return model

def tied_meta():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
        model[2].weight = model[0].weight
    return model

def weight(value):
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight = nn.Parameter(value, requires_grad=False)
    return model

def sparse(): return weight(torch.ones(2, 3).to_sparse())
def csr(): return weight(torch.ones(2, 3).to_sparse_csr())
def mkldnn(): return weight(torch.ones(2, 3).to_mkldnn())
def quantised(): return weight(torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8))
def integers(): return weight(torch.ones(2, 3, dtype=torch.int8))
def booleans(): return weight(torch.ones(2, 3, dtype=torch.bool))
def complex_(): return weight(torch.ones(2, 3, dtype=torch.complex64))
def float8(): return weight(torch.ones(2, 3).to(torch.float8_e4m3fn))

def exits(): sys.exit()
def exits_0(): sys.exit(0)
def exits_text(): sys.exit("no weights\\nat all")

class Odd(BaseException):
    def __str__(self):
        raise ValueError

def base_exception(): raise BaseException("the lot")
def odd(): raise Odd
def generator(): raise GeneratorExit
def recursion(): return recursion()
def memory(): return torch.zeros(1 << 50)

class Forward(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):
        print("forward")
        sys.exit(0)

class Weights(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def state_dict(self, *args, **kwargs):
        raise SystemExit(4)

class Moving(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

    def to(self, *args, **kwargs):
        raise BaseException("stays here")

class Lazy:
    @property
    def make(self):
        raise SystemExit(0)

lazy = Lazy()

class Meta(type):
    def __getattr__(self, name):
        raise RuntimeError("nothing here")

class Namespace(metaclass=Meta):
    pass

def printing():
    print("hello from print")
    print("hello from __stdout__", file=sys.__stdout__)
    os.write(1, b"hello from the file descriptor\\n")
    os.system("echo hello from a child")
    sys.stdout.write("hello without an end")
    os.chdir("/")
    import atexit
    atexit.register(print, "hello from atexit")
    model = nn.Sequential(nn.Linear(3, 2))
    torch.set_default_device("meta")
    return model
"""


@pytest.fixture
def factories(tmp_path, monkeypatch):
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("factories", "leaving"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def refused(capsys, *argv: str) -> str:
    """The one line that a refused command leaves."""
    assert main(["norms", "--quiet", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.splitlines()[-1]
    assert line.startswith("sn-fast: error: ")
    assert "Traceback" not in err
    return line


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "meta",
            "argument MODEL: 7 of the model's tensors are on the meta device and without values (0.weight, 0.bias,",
        ),
        ("meta_buffer", "1 of the model's tensors is on the meta device and without values (1.running_mean)"),
        ("sparse", "layer 0: its weight is a sparse_coo tensor; give a dense one"),
        ("csr", "layer 0: its weight is a sparse_csr tensor; give a dense one"),
        ("mkldnn", "layer 0: its weight is a mkldnn tensor; give a dense one"),
        ("quantised", "layer 0: its weight is quantised (torch.qint8)"),
        ("integers", "layer 0: its weight has dtype torch.int8"),
        ("booleans", "layer 0: its weight has dtype torch.bool"),
        ("complex_", "layer 0: its weight has dtype torch.complex64"),
        ("float8", "layer 0: its weight has dtype torch.float8_e4m3fn"),
        ("exits", "factories:exits, called without arguments, failed: SystemExit (/"),
        ("exits_0", "SystemExit: 0 (/"),
        ("exits_text", "SystemExit: no weights (/"),
        ("base_exception", "BaseException: the lot (/"),
        ("odd", "failed: Odd (/"),
        ("generator", "failed: GeneratorExit (/"),
        ("recursion", "RecursionError"),
        ("memory", "there is not enough memory"),
        ("Forward", "argument --input-size: the model does not take an input of size 3 (SystemExit: 0)"),
        ("Moving", "argument --device: moving the model to cpu failed: BaseException: stays here"),
        ("lazy.make", "looking up factories:lazy.make failed: SystemExit: 0"),
        ("Namespace.make", "looking up factories:Namespace.make failed: RuntimeError: nothing here"),
    ],
)
def test_models_of_all_kinds(factories, capsys, name, expected):
    assert expected in refused(capsys, f"factories:{name}", "--input-size", "3", "--json", "--device", "cpu")


def test_a_module_that_leaves(factories, capsys):
    assert "importing leaving failed: SystemExit: 0" in refused(capsys, "leaving:make")


def test_a_model_that_will_not_give_its_state_dict(factories, capsys):
    torch.save(nn.Linear(3, 2).state_dict(), "c.pt")
    assert "reading the model's state dict failed: SystemExit: 4" in refused(
        capsys, "factories:Weights", "--checkpoint", "c.pt"
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError])
def test_what_is_not_explained(error):
    with pytest.raises(error), failures_explained("it failed"):
        raise error


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("3x1000000x1000000", "argument --input-size: 3x1000000x1000000 is too large: there is not enough memory"),
        ("3x999999999999x999999999999", "is too large: there is not enough memory"),
        ("3x999999999999999999x1", "is too large: there is not enough memory"),
        ("3x9999999999999999999x1", "is too large: no tensor has such a shape"),
        ("9" * 5000, "is too large: no tensor has such a shape"),
        ("x".join(["1"] * 100), "is too large: no tensor has such a shape"),
        ("99999999999999999999", "is too large: no tensor has such a shape"),
    ],
)
def test_input_sizes_beyond_all_memory(nets, capsys, size, expected):
    line = refused(capsys, "nets:small", "--input-size", size)
    assert expected in line
    assert len(line) < 1400


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the limit needs /proc")
def test_activations_beyond_the_memory_fail_before_the_process_is_killed(nets, capsys, monkeypatch):
    (nets / "wide.py").write_text(
        "import torch\nfrom torch import nn\nkept = []\n"
        "class Wide(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.fc = nn.Linear(3, 2)\n"
        "    def forward(self, x):\n"
        "        for _ in range(64):\n            kept.append(torch.ones(1 << 24))\n"
        "        return self.fc(x)\n"
    )
    monkeypatch.setattr("sn_fast.running._memory_limit", lambda: own() + (1 << 29))
    line = refused(capsys, "wide:Wide", "--input-size", "3", "--device", "cpu", "--threads", "1")
    assert "argument --input-size: 3 is too large: there is not enough memory for the model's run on one input" in line
    sys.modules.pop("wide").kept.clear()
    torch.ones(1 << 20)


def own() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmData"))
    return 1024 * int(line.split()[1])


def test_a_measurement_that_fails_names_the_layer(nets, capsys, monkeypatch):
    def failing(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr("sn_fast.inspection.layers.operator_norm_interval", failing)
    line = refused(capsys, "nets:small", "--input-size", "1x6x6")
    assert "layer conv: measuring its norm failed: there is not enough memory (RuntimeError: [enforce fail" in line
    assert line.endswith("; leave it out with --exclude, or give a smaller --input-size")


@pytest.mark.parametrize("threads", ["1025", "99999999999999999999"])
def test_numbers_of_threads_that_no_machine_has(nets, capsys, threads):
    assert f"argument --threads: invalid value {threads}" in refused(capsys, "nets:small", "--threads", threads)


LONG = ["a" * 300, "ä" * 200, "/".join(["a" * 200] * 30), "a" * 5000]


@pytest.mark.parametrize("name", LONG)
def test_names_longer_than_a_file_system_takes(nets, capsys, name):
    for argv in (["--checkpoint", name], ["--checkpoint", name + ".safetensors"], ["--plot", name + ".png"]):
        assert f"argument {argv[0]}: " in refused(capsys, "nets:small", "--input-size", "1x6x6", *argv)
    assert "argument MODEL: " in refused(capsys, f"{name.replace('/', '.')}:make")
    assert "argument MODEL: nets has no" in refused(capsys, f"nets:{name.replace('/', '_')}")
    for option in ("--out", "--resume"):
        assert main(["train", option, name, "--quiet"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"sn-fast: error: argument {option}: ")


def test_layers_with_names_of_any_length(tmp_path):
    model = nn.Sequential()
    model.add_module("x" * 3000, nn.Linear(3, 2))
    model.add_module("\udcff" + "y" * 10, nn.Linear(2, 2))
    plot(inspect_model(model, (3,)), tmp_path / "a.svg", "\udcff" * 3)
    assert b"x" * 61 not in (tmp_path / "a.svg").read_bytes()


def test_what_a_factory_prints_goes_to_stderr(factories, capfd):
    argv = ["norms", "factories:printing", "--input-size", "3", "--quiet", "--plot", "a.png"]
    assert main([*argv, "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["layers"][0]["name"] == "0"
    assert out.count("\n") == 1
    for source in ("print", "__stdout__", "the file descriptor", "a child"):
        assert f"hello from {source}\n" in err
    assert "hello without an end" in err
    assert Path(factories, "a.png").exists()  # though the factory has left the folder
    assert main(argv) == 0
    assert capfd.readouterr().out.startswith("factories:printing, weights as made, input 3\n")


def test_a_process_whose_model_prints_until_its_end(tmp_path):
    (tmp_path / "factories.py").write_text(FACTORIES)
    process = start("norms", "factories:printing", "--input-size", "3", "--json", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(out)["model"] == "factories:printing"
    assert out.count(b"\n") == 1
    assert b"hello from atexit" in err


def test_a_model_on_the_meta_device_takes_its_values_from_a_checkpoint(factories, capsys):
    saved = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    torch.save(saved.state_dict(), "c.pt")
    argv = ["norms", "--input-size", "3", "--json", "--quiet", "--checkpoint"]
    assert main([*argv, "c.pt", "factories:meta"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    norm = float(torch.linalg.matrix_norm(saved[0].weight.detach().double(), 2))
    assert layer["lower"] <= norm * (1 + 1e-12)
    assert norm <= layer["upper"] <= norm * 1.001
    w = torch.randn(3, 3)
    torch.save({"0.weight": w, "2.weight": w}, "tied.pt")
    assert main([*argv, "tied.pt", "factories:tied_meta"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["tied"] == ["2"]


def test_quantised_layers_are_listed():
    class Quantized(nn.Module):
        def weight(self) -> None: ...

    Quantized.__module__ = "torch.ao.nn.quantized.dynamic.modules.linear"
    model = nn.Sequential(nn.Linear(3, 3), Quantized())
    assert quantized_layers(model) == ("1",)
    with pytest.raises(UserError, match="its quantised layers are not measured"):
        inspect_model(nn.Sequential(Quantized()), (3,))


def state(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"weight": torch.ones(2, 3), "bias": torch.zeros(2), **changes}


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (state(weight=torch.ones(2, 3).to_sparse()), "not dense floating-point numbers (weight: sparse_coo)"),
        (state(weight=torch.ones(2, 3).to_sparse_csr()), "(weight: sparse_csr)"),
        (state(weight=torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)), "(weight: qint8)"),
        (state(weight=torch.ones(2, 3, dtype=torch.int8)), "(weight: int8)"),
        (state(weight=torch.ones(2, 3, dtype=torch.bool)), "(weight: bool)"),
        (state(weight=torch.ones(2, 3, dtype=torch.complex64)), "(weight: complex64)"),
        (state(weight=torch.empty(2, 3, device="meta")), "is not of this model: "),
        ({0: torch.ones(2, 3), "bias": torch.zeros(2)}, "keys are not names of parameters (1 of another type (0))"),
        ({("a", 1): torch.ones(2, 3)}, "keys are not names of parameters"),
        (
            {None: torch.ones(2, 3), 2.5: torch.zeros(1)},
            "keys are not names of parameters (2 of another type (None, 2.5))",
        ),
        ({"state_dict": {b"weight": torch.ones(2, 3)}}, "keys are not names of parameters"),
        ({"weight": torch.ones(2, 3), "bias": 3}, "is not of this model: "),
        ({"weight": torch.ones(2, 3), "bias": "x"}, "is not of this model: "),
    ],
)
def test_state_dicts_that_cannot_be_loaded(nets, capsys, saved, expected):
    (nets / "plain.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 2)\n")
    torch.save(saved, "c.pt")
    assert expected in refused(capsys, "plain:make", "--checkpoint", "c.pt", "--input-size", "3")


KEYS = st.one_of(st.integers(), st.text(max_size=5), st.none(), st.booleans(), st.binary(max_size=3))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(saved=st.dictionaries(KEYS, st.one_of(KEYS, st.just(torch.ones(2, 3))), min_size=1, max_size=4))
def test_any_dict_is_refused_in_one_line(tmp_path, capsys, saved):
    torch.save(saved, tmp_path / "c.pt")
    argv = ["norms", "torch.nn:Identity", "--checkpoint", str(tmp_path / "c.pt"), "--input-size", "3"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_a_file_that_is_no_plot_stays(nets, capsys):
    for name, content in (("photo.png", b"\x89PNG\r\n\x1a\n..."), ("paper.pdf", b"%PDF-1.7"), ("empty.svg", b"")):
        (nets / name).write_bytes(content)
        line = refused(capsys, "nets:small", "--input-size", "1x6x6", "--plot", name)
        assert f"argument --plot: {name} exists and is not a plot of sn-fast, so it stays" in line
        assert (nets / name).read_bytes() == content
    (nets / "folder.png").mkdir()
    (nets / "link.png").symlink_to(nets / "nowhere")
    for name in ("folder.png", "link.png"):
        assert "exists and is not a plot" in refused(capsys, "nets:small", "--plot", name)
    for name in ("a.png", "a.pdf", "a.svg"):
        for _ in range(2):  # its own are replaced
            assert main(["norms", "nets:small", "--input-size", "1x6x6", "--quiet", "--plot", name]) == 0


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(nets, capsys):
    (nets / "closed").mkdir(mode=0o500)
    assert "cannot write into closed" in refused(capsys, "nets:small", "--plot", "closed/a.png")
