"""The stages: their order, and their shares of the time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A module of ``stages`` with a function ``run(context)``."""

    number: int
    name: str
    seconds: float  # its share of the default budget
    title: str


STAGES = (
    Stage(1, "build", 120, "compile the kernels for this GPU, in a copy of the sources"),
    Stage(2, "tests", 210, "the tests of what only a GPU can tell, and the test suite with tensors on the GPU"),
    Stage(3, "peaks", 12, "copy bandwidth, fp32, tf32 and bf16 rates of this GPU"),
    Stage(4, "power", 90, "power iteration and normalisation of three networks"),
    Stage(5, "updates", 38, "the attacks' updates"),
    Stage(6, "training", 50, "steps of adversarial training, with and without normalisation"),
    Stage(7, "profile", 20, "Nsight Compute's counters of the main kernels"),
)


def chosen(text: str) -> list[Stage]:
    """Stages of ``"all"``, ``"1,4-6"``, ``"build,power"``, in their own order."""
    if text == "all":
        return list(STAGES)
    numbers: set[int] = set()
    for word in filter(None, re.split(r"[,\s]+", text)):
        named = [s.number for s in STAGES if s.name == word]
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", word)
        found = named or ([*range(int(span[1]), int(span[2] or span[1]) + 1)] if span else [])
        if not found or not set(found) <= {s.number for s in STAGES}:
            raise ValueError(f"{word!r} is no stage: {', '.join(f'{s.number} {s.name}' for s in STAGES)}")
        numbers.update(found)
    if not numbers:
        raise ValueError("no stage was named")
    return [s for s in STAGES if s.number in numbers]


def limit_of(stage: Stage, remaining: Sequence[Stage], seconds_left: float) -> float:
    """Seconds that a stage may take: its share of what is left, so that no stage can take the time of a later one."""
    return seconds_left * stage.seconds / sum(s.seconds for s in remaining)
