"""What can end a run, besides what the user can put right."""

from __future__ import annotations

from pathlib import Path

from ...errors import UserError


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a job whose folder can be resumed.

    Attributes:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(f"interrupted; continue with resume({str(folder)!r})")
        self.folder = folder


class DivergedRun(UserError):
    """A run that ended because training diverged; its metrics.json says so."""


class Diverged(Exception):
    """The loss, a weight or a logit is no longer a finite number: training cannot go on."""
