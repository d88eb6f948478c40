"""Files that are either the old or the new version, never half of one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

UNFINISHED = ".sn_fast-*.part"
"""Names of files that a process was writing when it was killed."""


def replace_file(path: Path, content: bytes) -> None:
    """Write a file as a whole: whoever dies in between leaves the old one. A symbolic link stays one."""
    target = Path(os.path.realpath(path))
    # No other process writes to this name, and it is short where the file's own name is as long as can be.
    temporary = target.with_name(UNFINISHED.replace("*", f"{os.getpid()}-{secrets.token_hex(4)}"))
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
