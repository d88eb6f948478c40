"""What can end a job that is not a fault of the program."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from types import ModuleType


class UserError(Exception):
    """Something the user can put right. The message is one line: which argument, which value, what to do instead."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a job whose folder can be resumed."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(f"interrupted; continue with: sn-fast train --resume {shlex.quote(str(run_dir))}")


class Diverged(Exception):
    """The loss, a weight or a logit is no longer a finite number: training cannot go on."""


def require(module: str) -> ModuleType:
    """Import a module of an optional dependency, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name != package:  # installed, but broken: its own message says more
            raise
        raise UserError(f"the package {package} is not installed; run: pip install 'sn_fast[train]'") from error
