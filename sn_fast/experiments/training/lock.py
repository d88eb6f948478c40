"""One process at a time works in a run's folder.

The lock is one of the operating system (flock; on Windows msvcrt), so it ends with its process however that ends, and
that a process id is in use again means nothing. The file's content only says who holds it. A file that nobody has
locked is left over from a crash: it is taken over, unless it is of another machine, whose locks may not be seen here.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ...errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_HELD = (errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK)
_ATTEMPTS = 1000
_FAR = 1 << 30  # msvcrt's lock keeps others from reading what it covers, so it covers a byte behind the content


class InUse(UserError):
    """Another process works in the folder, or may do so."""


@contextmanager
def locked(folder: Path, argument: str) -> Iterator[None]:
    """Within this context no other process works in ``folder``.

    Raises:
        UserError: one does already, or the lock cannot be made; it names ``argument``, which gave the folder.
    """
    path = folder / NAME
    try:
        file = _acquire(path, argument)
    except OSError as error:
        raise UserError(f"argument `{argument}`: cannot make {path}: {error.strerror}") from None
    try:
        os.lseek(file, 0, os.SEEK_SET)
        os.ftruncate(file, 0)
        os.write(file, json.dumps(_this_process()).encode())
        yield
    finally:
        _release(path, file)


def _acquire(path: Path, argument: str) -> int:
    """The open and locked file."""
    for _ in range(_ATTEMPTS):
        created = True
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            created = False
            try:
                file = os.open(path, os.O_RDWR)
            except FileNotFoundError:  # released in between
                continue
        try:
            _check_owner(path, file, created, argument)
            # A holder that releases removes the file: a lock on the removed one would keep nobody out.
            if _is_at(file, path):
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def _check_owner(path: Path, file: int, created: bool, argument: str) -> None:
    """Lock the file, or raise UserError."""
    owner = {} if created else _owner(file)
    try:
        _lock(file)
    except OSError as error:
        if error.errno in _HELD:
            raise InUse(
                f"argument `{argument}`: {path.parent} is in use by {_described(owner)}: let it end, or stop it, and "
                "try again"
            ) from None
        if created:
            return  # a file system without locks: that this process made the file is the lock
        raise InUse(
            f"argument `{argument}`: {path.parent} is or was in use by {_described(owner)}, and its file system has no "
            f"locks that would tell: if that process has ended, delete {path} and try again"
        ) from None
    if owner and not _is_of_this_machine(owner) and _is_at(file, path):
        raise InUse(
            f"argument `{argument}`: {path.parent} is or was in use by {_described(owner)}, which cannot be seen "
            f"from here: if that process has ended, delete {path} and try again"
        )


def _lock(file: int) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        import msvcrt

        os.lseek(file, _FAR, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)


def _release(path: Path, file: int) -> None:
    with contextlib.suppress(OSError):
        if fcntl is not None and _is_at(file, path):
            path.unlink()  # while it is locked
    os.close(file)
    if fcntl is None:
        with contextlib.suppress(OSError):  # Windows keeps it while another process has it open
            path.unlink()


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _this_process() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "since": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
    }


def _is_of_this_machine(owner: dict[str, Any]) -> bool:
    """Also if it has started again, or if the owner was in another container of it."""
    here = _this_process()
    return owner.get("host") == here["host"] or bool(here["boot"] and owner.get("boot") == here["boot"])


def _boot() -> str:
    """What containers of one machine have in common, and a machine after its restart has not; empty if not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _owner(file: int) -> dict[str, Any]:
    """What the lock file says; empty where its holder has not written it yet."""
    try:
        os.lseek(file, 0, os.SEEK_SET)
        owner = json.loads(os.read(file, 4096))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _described(owner: dict[str, Any]) -> str:
    if not owner:
        return "another process"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"
