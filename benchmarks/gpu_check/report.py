"""Tables of what was measured, for docs/benchmarks.md: written by ``gpu_check --report``, never typed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import results
from .results import get
from .summary import bars

BEGIN, END = "<!-- generated: python -m benchmarks.gpu_check --report -->", "<!-- end of generated part -->"
NOTHING = "No GPU has run this version yet, and no claim about its speed is made."
_NORMALISATIONS = ("plain", "sn_fast", "torch", "published")


def write(root: Path = results.ROOT, folder: Path = results.FOLDER) -> None:
    """Renew the generated part of docs/benchmarks.md from the results in ``folder``."""
    contents = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    measured = [c for c in contents if c.get("schema") == results.SCHEMA and c.get("stages") and not c["rehearsal"]]
    lines = [line for c in measured for line in _tables(c)] or [NOTHING]
    path = root / "docs" / "benchmarks.md"
    results.replace_text(path, between(path.read_text(), "\n".join(lines).strip("\n")))


def between(text: str, generated: str) -> str:
    """``text`` with its part between the two marks replaced."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the document must have one {BEGIN!r} and one {END!r}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{rest.partition(END)[2]}"


# -- tables -----------------------------------------------------------------------------------------------------------


def _tables(content: Mapping[str, Any]) -> Iterator[str]:
    """What a refresh costs, and what adversarial training loses to it; the bars; then every table."""
    stages = content["stages"]
    yield f"**{_machine(content)}**"
    yield ""
    rows: list[Sequence[str]] = [
        (name, _us(p, "fp32", "update_host"), _us(p, "fp32", "power_step", "time"), _ratio(p, "peers", "published"))
        for name, p in _networks(stages, "power")
    ]
    heads: Sequence[str] = (
        "all layers, one power iteration, fp32",
        "as called (us)",
        "kernels alone (us)",
        "eager published loop",
    )
    yield from table(heads, rows)
    rows = [
        (name, mode, *_steps(t, mode), _share(t, mode)) for name, t in _networks(stages, "training") for mode in _MODES
    ]
    steps = ("PGD-10 step, batch 256, bf16 (ms)", "", "no SN", "sn_fast", "torch's", "published", "sn_fast's share")
    yield from table(steps, [row for row in rows if any(cell != _NONE for cell in row[2:6])])
    yield "Bars, as the check judges them:"
    yield ""
    yield from table(("", "measured", "wanted", ""), [(b.what, b.measured, b.wanted, b.verdict) for b in bars(stages)])
    rows = [
        (name, precision, _us(p, precision, "power_step", "time"), _us(p, precision, "power_step", "floors", "larger"))
        for name, p in _networks(stages, "power")
        for precision in ("fp32", "3xtf32", "tf32", "bf16")
    ]
    yield from table(("power iteration", "products", "kernels (us)", "floor (us)"), rows)
    updates = get(stages, "updates", "results") or {}
    rows = [
        (update, f"{size}, {dtype}", _percent(entry.get("of_copy")), _times(entry.get("eager_times_sn_fast")))
        for size, dtypes in updates.items()
        if isinstance(dtypes, Mapping)
        for dtype, entries in dtypes.items()
        for update, entry in entries.items()
    ]
    yield from table(("update", "batch", "of copy bandwidth", "eager / sn_fast"), rows)
    launches = get(stages, "profile", "results", "launches") or []
    keys = ("microseconds", "of_peak_dram", "of_fma_pipe", "of_tensor_pipe", "of_issue_slots", "warps_active")
    rows = [(f"`{x['kernel']}`", *(_number(x.get(key)) for key in keys)) for x in launches]
    heads = ("kernel (Nsight Compute)", "us", "% DRAM", "% FMA", "% tensor", "% issue slots", "% warps")
    yield from table(heads, rows)


# -- cells ------------------------------------------------------------------------------------------------------------

_NONE = "–"
_MODES = ("eager", "compiled")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Markdown, and an empty line; nothing without rows."""
    if rows:
        yield f"| {' | '.join(heads)} |"
        yield "|---" * len(heads) + "|"
        yield from (f"| {' | '.join(row)} |" for row in rows)
        yield ""


def _machine(content: Mapping[str, Any]) -> str:
    entry = next(iter(content["stages"].values()))
    torch, date = get(entry, "machine", "torch"), str(entry["date"])[:10]
    return f"{content['device']}, torch {torch}, {date}, sources {entry['sources']}"


def _networks(stages: Mapping[str, Any], stage: str) -> list[tuple[str, Any]]:
    entries = get(stages, stage, "results") or {}
    return [(name, entry) for name, entry in entries.items() if isinstance(entry, Mapping)]


def _steps(training: Any, mode: str) -> list[str]:
    times = [get(training, mode, "step", name, "median") for name in _NORMALISATIONS]
    return [_NONE if t is None else f"{t / 1000:.1f}" for t in times]


def _share(training: Any, mode: str) -> str:
    return _percent(get(training, mode, "sn_share", "of_step", "device"), digits=2)


def _us(content: Any, *path: str) -> str:
    value = get(content, *path)
    return _number(value.get("median") if isinstance(value, Mapping) else value)


def _ratio(content: Any, *path: str) -> str:
    return _times(get(content, *path, "host_times_sn_fast"))


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _times(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3g}x"


def _percent(value: float | None, digits: int = 0) -> str:
    return _NONE if value is None else f"{100 * value:.{digits}f} %"
