"""The folder of a run: a new one each time, and files that are either the old or the new version, never half of one."""

from __future__ import annotations

import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, first_line
from ..files import replace_file

_FORMAT = 1


class RunFolder:
    """config.json, metrics.json, checkpoint.pt and plots of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, out: str | os.PathLike[str] | None, default: str) -> RunFolder:
        """A new folder ``out``, which may exist if it is empty; None: runs/``default``, numbered until it is new."""
        path = Path("runs", default) if out is None else Path(out)
        try:
            if out is None:
                return cls(_make_unused(path))
            path.mkdir(parents=True, exist_ok=True)
            if not any(path.iterdir()):
                return cls(path)
        except OSError as error:
            raise UserError(f"argument --out: cannot make the folder {path}: {error.strerror}; give another") from None
        raise UserError(
            f"argument --out: {path} is not empty, and nothing is overwritten; give a new folder, or continue the run "
            f"there with --resume {path}"
        )

    @classmethod
    def existing(cls, path: str | os.PathLike[str]) -> RunFolder:
        """The folder of an earlier run."""
        folder = cls(Path(path))
        if not folder.path.is_dir():
            raise UserError(f"argument --resume: there is no folder {path}; give the folder of an earlier run")
        if not (folder.path / "checkpoint.pt").is_file():
            raise UserError(f"argument --resume: {path} has no checkpoint.pt; give the folder of an earlier run")
        return folder

    def write_json(self, name: str, document: dict[str, Any]) -> None:
        self.write(name, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())

    def read_config(self) -> Any:
        path = self.path / "config.json"
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"argument --resume: {path} is missing or damaged ({first_line(error)}); restore a copy, "
                "or start a new run"
            ) from None

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save({"format": _FORMAT, **state}, buffer)
        self.write("checkpoint.pt", buffer.getvalue())

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
                f"argument --resume: {path} is damaged ({first_line(error)}); restore a copy, or start a new run"
            ) from None
        if not isinstance(state, dict) or state.pop("format", None) != _FORMAT:
            raise UserError(f"argument --resume: {path} is no checkpoint of this version; start a new run")
        return state

    def write(self, name: str, content: bytes) -> None:
        """Replace a file as a whole."""
        target = self.path / name
        try:
            replace_file(target, content)
        except OSError as error:
            raise UserError(
                f"cannot write {target}: {error.strerror}; put that right, then continue with --resume {self.path}"
            ) from None


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
