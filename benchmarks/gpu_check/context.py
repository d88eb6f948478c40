"""What a stage is given: the device, the time, and where to record."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import results


@dataclass
class Context:
    """Of one stage, in its own process."""

    out: Path  # file of this stage's results
    previous: dict[str, Any]  # results of other stages, by name
    ends: float  # time.monotonic() at which the stage is killed
    rehearse: bool = False
    quick: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def record(self, name: str, value: Any) -> None:
        """Keep one result; ``name`` may be a path with slashes. Written to the file at once."""
        place = self.results
        *folders, last = name.split("/")
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = value
        self.save()

    def save(self) -> None:
        results.write(self.out, {"results": self.results, "failures": self.failures})

    def fail(self, message: str) -> None:
        """Note that something is wrong, and go on."""
        self.failures.append(message)
        self.save()
        print(f"FAILED: {message}", flush=True)

    def attempt(self, name: str, action: Callable[[], Any]) -> Any:
        """The result of ``action``; None, noted as a failure, if it raises."""
        try:
            return action()
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{name}: {type(error).__name__}: {str(error).strip()[:600]}")
            return None

    def left(self) -> float:
        """Seconds until the end of this stage."""
        return self.ends - time.monotonic()

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether ``seconds`` are left; if not, notes what was not measured for want of time."""
        if self.rehearse or self.left() > seconds:
            return True
        self.results.setdefault("left_out", []).append(name)
        self.save()
        print(f"left out for want of time: {name}", flush=True)
        return False

    @property
    def device(self) -> str:
        """Of the tensors."""
        return "cpu" if self.rehearse else "cuda"

    def pick(self, real: Any, rehearsal: Any) -> Any:
        """A size: that of a measurement, or the small one of a rehearsal."""
        return rehearsal if self.rehearse else real

    @property
    def repeats(self) -> int:
        """How often a time is taken."""
        return 2 if self.rehearse else 11 if self.quick else 25
