"""One process at a time in a run's folder, with real processes."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sn_fast.cli import main
from sn_fast.errors import UserError
from sn_fast.experiments.training import lock, resume, train
from sn_fast.experiments.training.config import TrainConfig
from sn_fast.experiments.training.lock import locked
from sn_fast.files import replace_file

from ...processes import start, wait_for
from .conftest import TINY
from .test_job import FILES, assert_same_run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes by fork")
FORK = multiprocessing.get_context("fork")


def contend(folder: Path, rounds: int, barrier: Any, wins: Any) -> None:
    for number in range(rounds):
        barrier.wait()
        try:
            with locked(folder, "out"):
                wins.put((number, os.getpid()))
                barrier.wait()  # all others have tried
        except UserError as error:
            if "is in use by" not in str(error):
                raise
            barrier.wait()


@pytest.mark.parametrize("leftover", [False, True])
def test_of_processes_that_race_exactly_one_wins(tmp_path, leftover):
    rounds, number = 40, 4
    if leftover:
        (tmp_path / ".lock").write_text('{"pid": 1')
    barrier, wins = FORK.Barrier(number), FORK.Queue()
    processes = [FORK.Process(target=contend, args=(tmp_path, rounds, barrier, wins)) for _ in range(number)]
    for process in processes:
        process.start()
    found = [wins.get(timeout=60) for _ in range(rounds)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * number
    assert sorted(round_ for round_, _ in found) == list(range(rounds))
    assert wins.empty()
    assert not list(tmp_path.iterdir())


def enter(folder: Path, counter: Any, most: Any, rounds: int) -> None:
    done = 0
    while done < rounds:
        try:
            with locked(folder, "out"):
                with counter.get_lock():
                    counter.value += 1
                    most.value = max(most.value, counter.value)
                time.sleep(0.0005)
                with counter.get_lock():
                    counter.value -= 1
            done += 1
        except UserError:
            pass


def test_never_two_inside_while_the_file_comes_and_goes(tmp_path):
    counter, most = FORK.Value("i", 0), FORK.Value("i", 0)
    processes = [FORK.Process(target=enter, args=(tmp_path, counter, most, 60)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (counter.value, most.value) == (0, 1)


def hold(folder: Path, holds: Any, how: str) -> None:
    with locked(folder, "out"):
        holds.set()
        if how == "raises":
            raise KeyboardInterrupt
        if how == "exits":
            os._exit(3)
        time.sleep(60)


@pytest.mark.parametrize("how", ["killed", "terminated", "exits", "raises"])
def test_the_lock_of_a_process_that_has_ended_is_taken_over(tmp_path, how):
    holds = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path, holds, how))
    process.start()
    assert holds.wait(30)
    if how in ("killed", "terminated"):
        with pytest.raises(UserError, match=rf"`path`: .* in use by process {process.pid} on \S+ since \d{{4}}-"):
            locked(tmp_path, "path").__enter__()
        os.kill(process.pid or 0, signal.SIGKILL if how == "killed" else signal.SIGTERM)
    process.join(30)
    assert (tmp_path / ".lock").exists() == (how != "raises")
    with locked(tmp_path, "path"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def owner(**changes: Any) -> str:
    return json.dumps({**lock._this_process(), **changes})


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        owner(),  # this very process id, as of a recycled one
        owner(pid=1),
        owner(pid=2**22 + 1),
        owner(boot="before the restart"),
        owner(host="another container"),
    ],
    ids=["empty", "cut", "list", "this process", "first process", "no process", "restart", "container"],
)
def test_a_file_that_nobody_has_locked_is_taken_over(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    if "another container" in content and not lock._boot():
        pytest.skip("no boot id here")
    with locked(tmp_path, "out"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("boot", ["another", ""])
def test_a_file_of_another_machine_is_not(tmp_path, boot, monkeypatch):
    if not boot:
        monkeypatch.setattr(lock, "_boot", lambda: "")
    content = owner(pid=77, host="node3", boot=boot)
    (tmp_path / ".lock").write_text(content)
    with pytest.raises(UserError, match=r"process 77 on node3 since .* if that process has ended, delete .*\.lock and"):
        locked(tmp_path, "path").__enter__()
    assert (tmp_path / ".lock").read_text() == content
    (tmp_path / ".lock").unlink()
    with locked(tmp_path, "path"):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def unsupported(_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(lock, "_lock", unsupported)
    with (
        locked(tmp_path, "out"),
        pytest.raises(
            UserError, match=rf"process {os.getpid()} on .* has no locks that would tell: .* delete .*\.lock"
        ),
    ):
        locked(tmp_path, "out").__enter__()
    with locked(tmp_path, "out"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_lock_can_be(tmp_path):
    with pytest.raises(UserError, match=r"argument `out`: cannot make .*absent.*No such file"):
        locked(tmp_path / "absent", "out").__enter__()
    (tmp_path / ".lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"argument `out`: cannot make .*\.lock"):
        locked(tmp_path, "out").__enter__()


def test_a_run_that_is_running_is_left_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [
        "--epochs",
        "500",
        "--train-size",
        "60",
        "--batch-size",
        "30",
        "--steps",
        "1",
        "--single",
        "--out",
        "run",
    ]
    process = start("train", *options, cwd=tmp_path)
    try:
        wait_for(tmp_path / "run" / "metrics.json", process)
        for argv in (["--resume", "run"], ["--out", "run"]):
            assert main(["train", *argv, "--quiet"]) == 2
            line = capsys.readouterr().err
            assert line.count("\n") == 1
            assert f"in use by process {process.pid} on" in line if "--resume" in argv else "is not empty" in line
        before = epochs_done(tmp_path / "run")
        deadline = time.monotonic() + 60
        while epochs_done(tmp_path / "run") < before + 3:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    monkeypatch.setattr("sn_fast.experiments.training.job._Run.complete", lambda self, progress: self)
    assert resume("run").epoch >= before + 3  # type: ignore[attr-defined]


def epochs_done(run: Path) -> int:
    done: int = json.loads((run / "metrics.json").read_text())["epochs_done"]
    return done


@pytest.mark.parametrize("leftovers", [[], [".checkpoint.pt.part", ".lock", ".sn_fast-77-ab.part"]])
def test_a_folder_left_before_its_first_file_is_reusable(tiny_run, tmp_path, leftovers, capsys):
    (tmp_path / "run").mkdir()
    for name in leftovers:
        (tmp_path / "run" / name).write_text("")
    with pytest.raises(UserError, match=r"has no checkpoint\.pt; it is empty, so start a run there with `out` .*run$"):
        resume(tmp_path / "run")
    path = tiny_run("run", epochs=1).path
    assert {file.name for file in path.iterdir()} == FILES
    err = capsys.readouterr().err
    assert err == "".join(
        f"sn-fast: removed {path / name}, which a run was writing when it ended\n"
        for name in leftovers
        if "part" in name
    )


@pytest.mark.parametrize("leftovers", [[], [".lock", ".sn_fast-77-ab.part"]])
def test_a_run_that_has_only_its_configuration_starts_from_the_beginning(tiny_run, tmp_path, leftovers, capsys):
    whole = tiny_run("whole", epochs=1)
    (tmp_path / "run").mkdir()
    config = (whole.path / "config.json").read_bytes()
    (tmp_path / "run" / "config.json").write_bytes(config)
    for name in leftovers:
        (tmp_path / "run" / name).write_text("")
    with pytest.raises(UserError, match=r"is not empty, and nothing is overwritten; .* with `resume`"):
        tiny_run("run", epochs=1)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"beta=9\.0: the run to resume has"):
        resume(tmp_path / "run", {"beta": 9.0})
    capsys.readouterr()
    resume(tmp_path / "run")
    assert_same_run(whole.path, tmp_path / "run")
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES
    assert "run has no checkpoint yet: the run starts from the beginning, with the options it has\n" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"beta": 1}', '{"beta": "x"}', '{"epochs": "9", "beta": 1}'])
def test_a_configuration_of_something_else(tmp_path, content, few_digits):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        UserError, match=r"config\.json is no configuration of this version \(\w+Error.*\); start a new"
    ):
        resume(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("count", range(5))
@pytest.mark.parametrize("removed", [False, True])
def test_a_run_that_ends_at_any_of_its_writes_can_go_on(tiny_run, tmp_path, monkeypatch, count, removed):
    writes = []

    def failing(path: Path, content: bytes) -> None:
        if len(writes) == count:
            if not removed:  # as if it was killed
                path.with_name(".sn_fast-1-0.part").write_bytes(content[:7])
            raise KeyboardInterrupt
        writes.append(path)
        replace_file(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("sn_fast.experiments.training.run_folder.replace_file", failing)
        with pytest.raises(KeyboardInterrupt) as caught:
            tiny_run("run", epochs=1, single=True)
    assert bool(str(caught.value)) == (count > 0)  # whether it says how to continue
    if count:
        result = resume(tmp_path / "run")
    else:
        assert (tmp_path / "run").exists() == (not removed)
        result = train(TrainConfig.create(**{**TINY, "epochs": 1, "single": True}), tmp_path / "run")
    assert result.metrics["status"] == "finished"
    assert {file.name for file in result.path.iterdir()} == FILES


@pytest.mark.parametrize("option", ["train_size", "steps", "epochs", "batch_size", "threads"])
@pytest.mark.parametrize("value", [2**31, 10**30])
def test_numbers_beyond_all_use(option, value):
    with pytest.raises(UserError, match=rf"{option}={value}: must be an integer (<|from)"):
        TrainConfig.create(**{option: value})


def write_often(path: Path, content: bytes) -> None:
    for _ in range(50):
        replace_file(path, content)


def test_processes_that_write_one_file_leave_one_of_their_versions(tmp_path):
    contents = [bytes([65 + i]) * 100_000 for i in range(3)]
    processes = [FORK.Process(target=write_often, args=(tmp_path / "a", content)) for content in contents]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if (tmp_path / "a").exists():
            assert (tmp_path / "a").read_bytes() in contents
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127])
def test_a_name_as_long_as_can_be(tmp_path, name):
    replace_file(tmp_path / name, b"x")
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "link").symlink_to("target")
    replace_file(tmp_path / "link", b"x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"x"
