"""The folder of a run: a new one each time, and files that are either the old or the new version, never half of one."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError, first_line
from ...files import UNFINISHED, replace_file
from ...running import notice
from .lock import NAME as LOCK
from .lock import locked

_FORMAT = 1
_FILES = ("config.json", "metrics.json", "checkpoint.pt", "*.png")  # whose unfinished versions were .NAME.part once


class NotEmpty(UserError):
    """A folder for a new run holds files."""


class RunFolder:
    """config.json, metrics.json, checkpoint.pt and plots of one run."""

    def __init__(self, path: Path, *, new: bool = False) -> None:
        self.path = path
        self._new = new

    @classmethod
    def create(cls, out: str | os.PathLike[str] | None, default: str) -> RunFolder:
        """A new folder ``out``, which may exist if it is empty; None: runs/``default``, numbered until it is new."""
        path = Path("runs", default) if out is None else Path(out)
        try:
            if out is None:
                return cls(_make_unused(path), new=True)
            new = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"argument `out`: cannot make the folder {path}: {error.strerror}; give another") from None
        folder = cls(path, new=new)
        folder.check_unused()
        return folder

    def check_unused(self) -> None:
        """Raise UserError if the folder holds more than what a run leaves that ended before its first file."""
        try:
            used = self._holds_files()
        except OSError as error:
            raise UserError(f"argument `out`: cannot read {self.path}: {error.strerror}; give another") from None
        if used:
            raise NotEmpty(
                f"argument `out`: {self.path} is not empty, and nothing is overwritten; give a new folder, or continue "
                f"the run there with `resume` {self.path}"
            )

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The folder of an earlier run, which may have ended before its first checkpoint."""
        folder = cls(Path(path))
        try:
            if not folder.path.is_dir():
                raise UserError(f"argument `path`: there is no folder {path}; give the folder of an earlier run")
            if not folder.is_begun():
                remedy = "give the folder of an earlier run"
                if not folder._holds_files():
                    remedy = f"it is empty, so start a run there with `out` {path}"
                raise UserError(f"argument `path`: {path} has no checkpoint.pt; {remedy}")
        except OSError as error:
            raise UserError(f"argument `path`: cannot read {path}: {error.strerror}") from None
        return folder

    def has_checkpoint(self) -> bool:
        return (self.path / "checkpoint.pt").is_file()

    def is_begun(self) -> bool:
        """Whether ``existing`` takes it."""
        return self.has_checkpoint() or (self.path / "config.json").is_file()

    @contextmanager
    def locked(self, argument: str) -> Iterator[None]:
        """Within this context no other process works in the folder. What one was writing when it ended is removed.

        Raises:
            UserError: another process works in it; it names ``argument``, which gave the folder.
        """
        with locked(self.path, argument):
            for path in self._unfinished():
                path.unlink(missing_ok=True)
                notice(f"removed {path}, which a run was writing when it ended")
            yield

    @contextmanager
    def discarded_if_empty(self) -> Iterator[None]:
        """If this context ends before anything is written, no empty folder stays behind that was not there before."""
        try:
            yield
        finally:
            if self._new:
                with suppress(OSError):
                    self.path.rmdir()

    def _holds_files(self) -> bool:
        return any(path.name != LOCK and path not in self._unfinished() for path in self.path.iterdir())

    def _unfinished(self) -> list[Path]:
        found = {*self.path.glob(UNFINISHED), *(p for name in _FILES for p in self.path.glob(f".{name}.part"))}
        return sorted(path for path in found if path.is_file())

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        self.write(name, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())

    def read_config(self) -> Any:
        path = self.path / "config.json"
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"argument `path`: {path} is missing or damaged ({first_line(error)}); restore a copy, "
                "or start a new run"
            ) from None

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, **state}, buffer)
        self.write("checkpoint.pt", buffer.getvalue())

    def write_weights(self, name: str, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write(name, buffer.getvalue())

    def read_checkpoint(self) -> dict[str, Any]:
        """The state that ``write_checkpoint`` was given, tensors on the CPU."""
        path = self.path / "checkpoint.pt"
        try:
            # torch.load does not compare check sums, so a flipped bit would go unnoticed.
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"check sum of {damaged} differs")
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can fail in any way
            raise UserError(
                f"argument `path`: {path} is damaged ({first_line(error)}); restore a copy, or start a new run"
            ) from None
        if not isinstance(state, dict) or state.pop("format", None) != _FORMAT:
            raise UserError(f"argument `path`: {path} is no checkpoint of this version; start a new run")
        return state

    def write(self, name: str, content: bytes) -> None:
        """Replace a file as a whole."""
        target = self.path / name
        try:
            replace_file(target, content)
        except OSError as error:
            raise UserError(
                f"cannot write {target}: {error.strerror}; put that right, then continue with `resume` {self.path}"
            ) from None


class FollowersFolder(RunFolder):
    """The folder as the processes see it that do not lead: nothing is written."""

    def write(self, name: str, content: bytes) -> None:
        pass


def _make_unused(path: Path) -> Path:
    """Make ``path``, or the first of path-2, path-3, ... that does not exist; two runs at once get two folders."""
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
