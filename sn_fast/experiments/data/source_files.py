"""The official files of a data set in a folder of the user's: found, read whole, and checked."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import OptionError, UserError

REBUILT = "a rebuilt or reduced file is accepted with `allow_partial`"


@dataclass(frozen=True)
class Origin:
    """Where the official files of a data set are to be had, and the data set's name for messages."""

    name: str
    source: str

    def damaged(self, file: Path | str, why: str) -> UserError:
        return UserError(f"data set {self.name}: {file} {why}; get it again from {self.source}")

    def missing(self, files: str, root: Path, places: Sequence[str]) -> UserError:
        belongs = " or ".join(dict.fromkeys(str(root / place) for place in places))
        return UserError(
            f"data set {self.name}: {files} not found; put the official files into {belongs} "
            f"(they are to be had from {self.source}; nothing is downloaded)"
        )


def read_file(origin: Origin, path: Path, most: int) -> bytes:
    """A file whole, uncompressed if its name ends with .gz.

    Raises:
        UserError: it cannot be read, its gzip data are damaged, or it holds more than ``most`` bytes.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            content: bytes = file.read(most + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise origin.damaged(path, "is cut or damaged (gzip)") from None
    except OSError as error:
        raise UserError(f"data set {origin.name}: cannot read {path}: {error.strerror or error}") from None
    if len(content) > most:
        raise origin.damaged(path, f"holds more than the {most} bytes that it can have")
    return content


def md5_of(content: bytes) -> str:
    """The MD5 sum, which tells an official file from others; it is no proof against a forged one."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def check_sum(
    origin: Origin, path: Path | str, content: bytes, md5: str, *, official: Mapping[str, str] | None = None
) -> None:
    """Compare ``content`` with the official file's MD5 sum; ``official`` has those of all the set's files, by name.

    Raises:
        UserError: it is another.
    """
    found = md5_of(content)
    if found == md5:
        return
    other = next((name for name, known in (official or {}).items() if known == found), None)
    if other is not None:
        raise origin.damaged(path, f"is the official {other} under a wrong name")
    raise origin.damaged(path, f"is not the official file: its MD5 sum is {found}, not {md5} ({REBUILT})")


def require_folder(origin: Origin, root: Path) -> None:
    """Raise unless ``root`` is a folder.

    Raises:
        UserError: it is a file.
    """
    if not root.is_dir():
        raise OptionError("root", str(root), f"is not a folder; give the one with the official files of {origin.name}")
