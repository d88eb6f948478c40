"""Ctrl-C and SIGTERM at any moment: one line, exit code 128 + the signal, no traceback."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from sn_fast import _interrupts
from sn_fast.cli import main

from .processes import start, wait_for

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals to other processes are POSIX")

# What code that is not ours does to the KeyboardInterrupt that comes up in it.
WAYS = {
    "raises it": "while True: time.sleep(0.01)",
    "swallows it": "while True:\n    try: time.sleep(0.01)\n    except BaseException: pass",
    "turns it": "try: time.sleep(60)\nexcept BaseException: raise ImportError('initialization failed') from None",
    "in a destructor": (
        "class D:\n    def __del__(self):\n        time.sleep(0.3)\nfor _ in range(1000):\n    D()\ntime.sleep(60)"
    ),
}


def folder(tmp_path: Path, module: str, way: str) -> Path:
    """A module that says when it is being imported, and what then happens to the signal."""
    (tmp_path / module).write_text(f"import time\nopen('ready', 'w').close()\n{WAYS[way]}\n")
    return tmp_path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("number", "word"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_while_torch_is_imported(tmp_path, way, number, word):
    process = start("info", cwd=folder(tmp_path, "torch.py", way))
    wait_for(tmp_path / "ready", process)
    process.send_signal(number)
    assert process.communicate(timeout=20) == (b"", f"sn-fast: {word}\n".encode())
    assert process.returncode == 128 + number


@pytest.mark.parametrize(
    "way", ["swallows it", *(pytest.param(way, marks=pytest.mark.slow) for way in WAYS if way != "swallows it")]
)
def test_while_a_model_is_imported(tmp_path, way):
    process = start("norms", "nets:make", "--json", cwd=folder(tmp_path, "nets.py", way))
    wait_for(tmp_path / "ready", process)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"sn-fast: interrupted\n")
    assert process.returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.15, 0.3, 0.6, 1.2])
def test_at_several_delays(tmp_path, delay):
    process = start("info", cwd=tmp_path)
    wait_for_handler(process)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if process.returncode != 0:  # it was not over yet
        assert (process.returncode, out, err) == (130, b"", b"sn-fast: interrupted\n")


def wait_for_handler(process) -> None:
    """Until the process catches SIGINT itself: before, it is Python that starts, and answers."""
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    while process.poll() is None:
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:  # ours is the first handler of SIGTERM
            return
        time.sleep(0.001)


def test_as_soon_as_the_package_is_imported(tmp_path):
    for _ in range(5):
        process = start("info", cwd=tmp_path)
        wait_for_handler(process)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == (b"", b"sn-fast: interrupted\n")
        assert process.returncode == 130


STUCK = """
import ctypes
import sn_fast._interrupts
sn_fast._interrupts.GRACE = 0.2

def make():
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_init(mutex, None)
    libc.pthread_mutex_lock(mutex)
    open("ready", "w").close()
    libc.pthread_mutex_lock(mutex)  # waits for ever, in C, whatever signals come
"""


def test_in_a_call_that_does_not_return(tmp_path):
    (tmp_path / "nets.py").write_text(STUCK)
    process = start("norms", "nets:make", cwd=tmp_path)
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"sn-fast: interrupted\n")
    assert process.returncode == 130


FORKING = """
import os, signal, time
import sn_fast._interrupts
from torch import nn
sn_fast._interrupts.GRACE = 0.2

def make():
    for number in (signal.SIGTERM, signal.SIGINT):
        child = os.fork()
        if not child:
            try:
                time.sleep(60)
            finally:
                os._exit(7)
        time.sleep(0.2)
        os.kill(child, number)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    time.sleep(0.5)
    return nn.Linear(3, 2)
"""


def test_signals_of_a_child_are_its_own(tmp_path):
    (tmp_path / "nets.py").write_text(FORKING)
    process = start("norms", "nets:make", "--input-size", "3", "--quiet", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert b"1 layer measured" in out
    assert err == b"-15\n7\n"


@pytest.mark.slow
def test_an_ignored_signal_stays_ignored(tmp_path):
    process = start("info", cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    wait_for_handler(process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert b"sn_fast" in out


@pytest.mark.parametrize("networks", [["--single"], []], ids=["one", "two, in two threads"])
def test_training_says_how_to_continue(tmp_path, networks):
    process = start("train", "--epochs", "500", "--train-size", "60", "--out", "run", *networks, cwd=tmp_path)
    wait_for(tmp_path / "run" / "metrics.json", process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, b"")
    assert err.endswith(b"sn-fast: terminated; continue with: sn-fast train --resume run\n")
    assert err.count(b"sn-fast: ") == 1
    assert b"Traceback" not in err
    assert not {path.name for path in (tmp_path / "run").iterdir()} - {"config.json", "metrics.json", "checkpoint.pt"}


def test_programs_that_import_the_package_keep_their_handlers():
    assert not _interrupts.is_command()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "pytest" in sys.modules


@pytest.mark.parametrize(
    ("argv", "original", "expected"),
    [
        (["-m"], ["python", "-m", "sn_fast"], True),
        (["-m", "train", "--eps", "1"], ["python", "-X", "dev", "-m", "sn_fast", "train", "--eps", "1"], True),
        (["-m", "info"], ["python", "-Imsn_fast", "info"], True),
        (["-m", "sn_fast"], ["python", "-m", "pytest", "sn_fast"], False),
        (["-m", "sn_fast"], ["python", "-m", "pdb", "sn_fast"], False),
        (["/usr/bin/sn-fast", "info"], ["python3", "/usr/bin/sn-fast", "info"], True),
        (["C:/bin/sn-fast.exe"], ["python.exe", "C:/bin/sn-fast.exe"], True),
        (["/usr/bin/sn-fast"], ["python3", "-c", "from multiprocessing.spawn import spawn_main"], False),
        (["train.py", "sn-fast"], ["python", "train.py", "sn-fast"], False),
        ([""], ["python"], False),
        (["-c"], ["python", "-c", "import sn_fast"], False),
    ],
)
def test_which_processes_are_the_command(monkeypatch, argv, original, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", original)
    assert _interrupts._is_command() is expected


def test_an_exception_that_ctrl_c_has_become(monkeypatch, capsys):
    def failing(*_: object) -> None:
        _interrupts._State.number = signal.SIGINT
        raise SystemError("returned NULL without setting an exception")

    monkeypatch.setattr(_interrupts._State, "number", 0)
    monkeypatch.setattr("sn_fast.cli.info.info", failing)
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "sn-fast: interrupted\n")


def test_the_line_says_how_to_continue_also_where_the_exception_is_lost(monkeypatch):
    assert _interrupts.line() == "sn-fast: interrupted"
    _interrupts.note("interrupted; continue with: sn-fast train --resume run")
    try:
        assert _interrupts.line() == "sn-fast: interrupted; continue with: sn-fast train --resume run"
        monkeypatch.setattr(_interrupts._State, "number", signal.SIGTERM)
        assert _interrupts.line() == "sn-fast: terminated; continue with: sn-fast train --resume run"
        assert _interrupts.line(KeyboardInterrupt("interrupted; other")) == "sn-fast: terminated; other"
    finally:
        _interrupts.note("")
