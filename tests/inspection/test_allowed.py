"""Checkpoints with objects beside their tensors: named, and loaded once they are allowed."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import json
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sn_fast.cli import main
from sn_fast.errors import UserError
from sn_fast.inspection import load_checkpoint


class Colour(enum.Enum):
    RED = 1


class Options:
    def __init__(self) -> None:
        self.lr = 0.1


class Attributes(dict[str, int]):
    def __init__(self, **values: int) -> None:
        super().__init__(values)
        self.__dict__ = self  # type: ignore[assignment]


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


OBJECTS = {
    "Namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(steps=3)),
    "float64": np.float64(0.5),
    "float32": np.float32(0.5),
    "int64": np.int64(5),
    "str_": np.str_("x"),
    "array": np.arange(3.0),
    "path": pathlib.Path("runs/1"),
    "pure path": pathlib.PureWindowsPath("c:/x"),
    "datetime": datetime.datetime(2026, 1, 1),
    "defaultdict": collections.defaultdict(list, {"a": [1]}),
    "own dict": Attributes(a=1),
    "slice": slice(1, 2),
    "enum": Colour.RED,
    "own": Options(),
    "several": [argparse.Namespace(a=1), pathlib.Path("x"), np.float64(2)],
    "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], 0.1), 2),
}


def options_in(message: str) -> list[str]:
    return re.findall(r"`allow_classes` (\S+?)[;,]?(?= |$)", message)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", OBJECTS)
def test_the_options_that_the_message_names_load_the_file(tmp_path, name, zipped):
    before = set(map(str, torch.serialization.get_safe_globals()))
    saved, model = nn.Linear(3, 2), nn.Linear(3, 2)
    document = {"state_dict": saved.state_dict(), "args": OBJECTS[name]}
    torch.save(document, tmp_path / "c.pt", _use_new_zipfile_serialization=zipped)
    allowed: list[str] = []
    for _ in range(1 if zipped else 8):  # the older format names one class at a time
        with pytest.raises(UserError, match=r"argument `checkpoint`: .* holds more than tensors and numbers") as caught:
            load_checkpoint(model, tmp_path / "c.pt", allowed)
        new = options_in(str(caught.value))
        assert new
        assert not set(new) & set(allowed)
        assert "\n" not in str(caught.value)
        assert not torch.equal(model.weight, saved.weight)
        allowed += new
        try:
            load_checkpoint(model, tmp_path / "c.pt", allowed)
        except UserError:
            continue
        break
    assert torch.equal(model.weight, saved.weight)
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_from_the_command_line(nets, capsys):
    (nets / "settings.py").write_text("class Config:\n    pass\n")
    import settings

    model = nn.Linear(3, 2)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(c=settings.Config())}, "c.pt")
    (nets / "plain.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 2)\n")
    argv = ["norms", "plain:make", "--input-size", "3", "--json", "--quiet", "--checkpoint", "c.pt"]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert (
        "argparse.Namespace, settings.Config, and loading that could run any program: if you trust the file, add "
        in err
    )
    added = re.search("add (.*); or save", err)
    assert added
    assert shlex.split(added[1]) == ["--allow-class", "argparse.Namespace", "--allow-class", "settings.Config"]
    assert main([*argv, *shlex.split(added[1])[:2]]) == 2
    err = capsys.readouterr().err
    assert "settings.Config" in err
    assert "argparse.Namespace" not in err
    assert main([*argv, *shlex.split(added[1])]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    norm = float(torch.linalg.matrix_norm(model.weight.detach().double(), 2))
    assert layer["lower"] * (1 - 1e-9) <= norm <= layer["upper"]
    del sys.modules["settings"]


def test_a_whole_model(tmp_path):
    saved, model = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 2))
    torch.save(saved, tmp_path / "c.pt")
    with pytest.raises(UserError, match=r"save model\.state_dict\(\) in place of the model") as caught:
        load_checkpoint(model, tmp_path / "c.pt")
    allowed = options_in(str(caught.value))
    assert "torch.nn.modules.linear.Linear" in allowed
    load_checkpoint(model, tmp_path / "c.pt", allowed)
    assert torch.equal(model[0].weight, saved[0].weight)


def test_a_class_that_is_elsewhere_now(tmp_path, monkeypatch):
    model = nn.Linear(3, 2)
    monkeypatch.setattr(Options, "__module__", "__main__")
    monkeypatch.setattr(sys.modules["__main__"], "Options", Options, raising=False)
    torch.save({"model": model.state_dict(), "args": Options()}, tmp_path / "c.pt")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"add `allow_classes` __main__\.Options;"):
        load_checkpoint(model, tmp_path / "c.pt")
    with pytest.raises(
        UserError, match=r"there is no __main__\.Options, .* give `allow_classes` __main__\.Options=MODULE\.Options"
    ):
        load_checkpoint(model, tmp_path / "c.pt", ["__main__.Options"])
    load_checkpoint(model, tmp_path / "c.pt", [f"__main__.Options={__name__}.Options"])


@pytest.mark.parametrize("stored", ["pathlib._local.PosixPath", "numpy.core.multiarray.scalar"])
def test_names_of_other_versions(stored):
    from sn_fast.inspection.allowed import allowed

    with allowed([stored]):
        assert stored in [entry[1] for entry in torch.serialization.get_safe_globals() if isinstance(entry, tuple)]


@pytest.mark.parametrize(
    "call", [Calls(eval, "1/0"), Calls(print, "x"), Calls(subprocess.Popen, "false"), Calls(getattr, 1, "real")]
)
def test_what_starts_programs_is_never_loaded(tmp_path, call, capfd):
    model = nn.Linear(3, 2)
    torch.save({"model": model.state_dict(), "x": call}, tmp_path / "c.pt")
    name = f"{call.call[0].__module__}.{call.call[0].__qualname__}"
    stored = "commands.Popen" if "Popen" in name else name  # pickle's protocol 2 has Python 2's names
    with pytest.raises(UserError, match=rf"calls {re.escape(stored)} when it is loaded, .* never loaded") as caught:
        load_checkpoint(model, tmp_path / "c.pt")
    assert "allow_classes" not in str(caught.value)
    with pytest.raises(
        UserError, match=rf"argument `allow_classes`: invalid value {re.escape(name)}: it could run any"
    ):
        load_checkpoint(model, tmp_path / "c.pt", [name])
    with pytest.raises(UserError, match="it could run any"):
        load_checkpoint(model, tmp_path / "c.pt", [f"{name}=argparse.Namespace"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Namespace", "invalid value 'Namespace': give module.Class, e.g. argparse.Namespace"),
        ("", "give module.Class"),
        ("argparse.", "give module.Class"),
        ("argparse.Nowhere", "there is no argparse.Nowhere"),
        ("nowhere.Class", "there is no nowhere.Class"),
        ("math.pi", "invalid value math.pi: a float, not a class"),
        ("os.system", "invalid value os.system: it could run any program"),
        ("broken.Class", "importing broken failed: SyntaxError"),
    ],
)
def test_names_that_are_of_no_class(nets, capsys, name, expected):
    torch.save(nn.Linear(3, 2).state_dict(), "c.pt")
    assert main(["norms", "torch.nn:Identity", "--checkpoint", "c.pt", "--allow-class", name]) == 2
    err = capsys.readouterr().err
    assert err.startswith("sn-fast: error: argument --allow-class: ")
    assert err.count("\n") == 1
    assert expected in err


def test_it_is_for_checkpoints(nets, capsys):
    assert main(["norms", "nets:small", "--allow-class", "argparse.Namespace"]) == 2
    assert "argument --allow-class: needs --checkpoint FILE" in capsys.readouterr().err
