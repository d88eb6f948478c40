from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from sn_fast.experiments.training import UserError
from sn_fast.experiments.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", default="unused")


def test_default_names_are_new_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [RunFolder.create(None, "digits-pgm").path for _ in range(3)]
    assert paths == [Path("runs", name) for name in ("digits-pgm", "digits-pgm-2", "digits-pgm-3")]


def test_an_empty_folder_is_taken_and_one_with_files_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty", "unused").path == tmp_path / "empty"
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match=r"argument `out`: .*full is not empty, and nothing is overwritten"):
        RunFolder.create(full, "unused")
    assert (full / "mine.txt").read_text() == "kept"


def test_a_place_where_no_folder_can_be_is_refused(tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("a file")
    monkeypatch.chdir(tmp_path)
    for out in ("runs", "runs/below", None):
        with pytest.raises(UserError, match=r"argument `out`: cannot make the folder runs.*give another"):
            RunFolder.create(out, "unused")
    assert (tmp_path / "runs").read_text() == "a file"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(folder, monkeypatch, failing, error):
    folder.write("metrics.json", b"old")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        folder.write("metrics.json", b"new and longer")
    assert [p.name for p in folder.path.iterdir()] == ["metrics.json"]
    assert (folder.path / "metrics.json").read_bytes() == b"old"


def test_a_full_disk_names_file_and_remedy(folder, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*x\.json: No space left on device; .*`resume`"):
        folder.write_json("x.json", {})


def test_what_is_written_is_on_disk_before_it_takes_the_old_ones_place(folder, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    folder.write("a", b"content")
    assert calls == ["fsync", "replace"]


def test_json_has_no_infinity(folder):
    with pytest.raises(ValueError, match="Out of range"):
        folder.write_json("a.json", {"beta": float("inf")})
    assert not list(folder.path.iterdir())


def test_a_checkpoint_comes_back(folder):
    folder.write_checkpoint({"epoch": 3, "weights": torch.arange(4.0)})
    state = folder.read_checkpoint()
    assert state.keys() == {"epoch", "weights"}
    assert torch.equal(state["weights"], torch.arange(4.0))


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip_one_bit(content: bytes) -> bytes:
    place = content.index(torch.full((64,), 1.5).numpy().tobytes()) + 100
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [_truncate, _flip_one_bit, lambda _: b"", lambda _: b"not a checkpoint"])
def test_a_damaged_checkpoint_is_refused(folder, damage):
    folder.write_checkpoint({"weights": torch.full((64,), 1.5)})
    path = folder.path / "checkpoint.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"argument `path`: .*checkpoint\.pt is damaged \(.+\); restore") as caught:
        folder.read_checkpoint()
    assert "\n" not in str(caught.value)


def test_a_file_that_would_run_code_is_refused(folder):
    torch.save({"format": 1, "model": os.system}, folder.path / "checkpoint.pt")
    with pytest.raises(UserError, match="is damaged"):
        folder.read_checkpoint()


def test_a_checkpoint_of_something_else_is_refused(folder):
    torch.save({"weights": torch.zeros(2)}, folder.path / "checkpoint.pt")
    with pytest.raises(UserError, match="is no checkpoint of this version"):
        folder.read_checkpoint()
