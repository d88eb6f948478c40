"""Streams of any encoding, and streams that nobody reads."""

from __future__ import annotations

import io
import json
import os
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sn_fast.cli import main, output
from sn_fast.experiments.data import samples as data_module

from .processes import start

NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module("größe_β_层", nn.Linear(3, 2))

    def forward(self, x):
        return self.get_submodule("größe_β_层")(x)
"""
ENCODINGS = ["ascii", "cp1252", "latin-1", "cp437", "utf-8"]
TRAIN = ["train", "--train-size", "60", "--epochs", "1", "--batch-size", "30", "--steps", "1", "--eps", "0.3", "--out"]


def exit_code(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as leaving:  # of --help
        return int(leaving.code or 0)


class Streams:
    """stdout and stderr as Python makes them for an encoding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self.out, self.err, self.encoding = io.BytesIO(), io.BytesIO(), encoding
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(self.out, encoding, errors="strict", newline="\n"))
        monkeypatch.setattr(
            sys, "stderr", io.TextIOWrapper(self.err, encoding, errors="backslashreplace", newline="\n")
        )

    def text(self) -> tuple[str, str]:
        sys.stdout.flush(), sys.stderr.flush()
        return self.out.getvalue().decode(self.encoding), self.err.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_in_every_encoding(monkeypatch, tmp_path, encoding):
    load = data_module.load
    monkeypatch.setattr(data_module, "load", lambda name: tuple(part[:240] for part in load(name)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "wide_nets", raising=False)
    (tmp_path / "wide_nets.py").write_text(NETS, encoding="utf-8")

    def run(*argv: str) -> str:
        streams = Streams(monkeypatch, encoding)
        assert exit_code(*argv) == 0
        out, err = streams.text()
        assert "Traceback" not in err
        assert "\\u" not in err
        return out

    assert "versions and backend" in run("--help")
    for command in ("train", "norms", "info"):
        assert f"sn-fast {command}" in run(command, "--help")
    assert "\\u" not in run("train", "--help")
    assert "torch" in run("info")
    trained = run(*TRAIN, "größe-层")
    if encoding in ("ascii", "latin-1", "cp1252"):
        assert "PGM l2 eps = 0.3 *" in trained
        assert "WRM 1/(2gamma) = 0.3" in trained
    if encoding == "utf-8":
        assert "PGM ℓ2 ε = 0.3 *" in trained
    table = [line for line in trained.splitlines() if line.startswith("  ") and "%" not in line]
    assert len({len(line) for line in table if line.split()[0] in ("clean", "FGM", "PGM", "WRM")}) == 1
    norms = run("norms", "wide_nets:Net", "--input-size", "3", "--plot", "層.png")
    assert {"ascii": "grosse_beta_?", "utf-8": "größe_β_层"}.get(encoding, "größe_") in norms
    assert json.loads(run("norms", "wide_nets:Net", "--input-size", "3", "--json"))["layers"][0]["name"] == "größe_β_层"
    for name in ("config.json", "metrics.json"):
        json.loads((tmp_path / "größe-层" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("bad", ["--data=größe", "--resume=größe-层", "--resume=\udcff/\udcfe"])
def test_errors_in_a_narrow_encoding(monkeypatch, bad, tmp_path):
    monkeypatch.chdir(tmp_path)
    streams = Streams(monkeypatch, "ascii")
    assert main(["train", bad]) == 2
    sys.stderr.flush()
    line = streams.err.getvalue()
    assert line.startswith(b"sn-fast: error: argument --")
    assert line.count(b"\n") == 1
    assert (b"\xff/\xfe" in line) == ("udcff" in ascii(bad))


@given(st.text(max_size=40), st.sampled_from(ENCODINGS))
def test_any_text_can_be_written(text, encoding):
    output.prepare()
    for kept in (text, output._plain(text, encoding)):
        kept.encode(encoding, "sn_fast.plain")
    if all(character in string.printable for character in text):
        assert output._plain(text, encoding) == text


@given(st.binary(max_size=20))
def test_bytes_of_file_names_come_out_as_they_went_in(name):
    output.prepare()
    assert os.fsdecode(name).encode("utf-8", "sn_fast.plain") == name


def test_columns_stay_in_place():
    assert output._plain("ε = 1    x    y", "ascii") == "eps = 1  x    y"
    assert output._plain("γ γ           1\nb b           2", "ascii") == "gamma gamma   1\nb b           2"
    assert output._plain("ε x  y", "ascii") == "eps x y"
    assert output._plain("γ  y     z", "ascii") == "gamma y  z"


@pytest.mark.parametrize(
    "argv", [["info"], ["info", "--json"], ["--help"], ["norms", "--help"], ["norms", "torch.nn:Identity"]]
)
@pytest.mark.parametrize("closed", ["stdout", "both"])
def test_a_pipe_without_a_reader(monkeypatch, capfd, argv, closed):
    def broken() -> io.TextIOWrapper:
        read, write = os.pipe()
        os.close(read)
        return open(write, "w", encoding="utf-8")

    monkeypatch.setattr(sys, "stdout", broken())
    if closed == "both":
        monkeypatch.setattr(sys, "stderr", broken())
    code = exit_code(*argv)
    expected = 2 if argv[0] == "norms" and "Identity" in argv[1] else 141
    assert code == expected
    sys.stdout.close()  # what Python does at its end, and what fails if something is left in the buffer
    sys.stderr.close() if closed == "both" else None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 2
    monkeypatch.undo()
    assert capsys.readouterr().err == "sn-fast: error: cannot write to standard output: No space left on device\n"


def test_processes_with_closed_pipes_and_without_streams(tmp_path):
    read, write = os.pipe()
    os.close(read)
    process = start("info", cwd=tmp_path, stdout=write)
    os.close(write)
    assert process.communicate(timeout=120) == (None, b"")
    assert process.returncode == 141


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&-"])
def test_closed_streams(tmp_path, redirection):
    command = f"exec {sys.executable} -m sn_fast info {redirection}"
    process = subprocess.run(command, shell=True, cwd=Path(__file__).parents[1], capture_output=True, check=False)
    assert process.returncode == 0
    assert b"Traceback" not in process.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "ascii"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_process_in_a_narrow_locale(tmp_path, env):
    process = start(*TRAIN, "run", "--single", cwd=tmp_path, env=env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert b"PGM l2 eps = 0.3 *" in out
    assert b"Traceback" not in err
