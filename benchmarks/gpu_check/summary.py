"""The bars that the kernels are to reach, and a table of what was measured against them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import get

_MISSING = "not measured"
Results = Mapping[str, Any]


@dataclass
class Bar:
    """One line: what, how much, and whether that is enough (None: nothing to judge)."""

    what: str
    measured: str
    wanted: str
    passed: bool | None

    @property
    def verdict(self) -> str:
        """In a word."""
        return _MISSING if self.passed is None else "PASS" if self.passed else "MISS"


def bars(stages: Results) -> Iterator[Bar]:
    """Of the stages there are, in their order."""
    for name, entry in stages.items():
        if name in _BARS:
            yield from _BARS[name](entry.get("results", {}) | {"stage": entry})


def _build(results: Results) -> Iterator[Bar]:
    kernels = get(results, "info", "kernels")
    yield Bar("kernels", kernels or _MISSING, "load", None if kernels is None else kernels.startswith("CUDA kernels"))


def _tests(results: Results) -> Iterator[Bar]:
    counts, ended = results.get("counts"), bool(results.get("ended"))
    if counts is None:
        yield Bar("tests", _MISSING, "all pass", None)
        return
    bad = counts.get("failed", 0) + counts.get("error", 0)
    text = f"{counts.get('passed', 0)} passed, {bad} failed, {counts.get('skipped', 0)} skipped"
    yield Bar("tests", text + ("" if ended else ", stopped"), "all pass", not bad and ended)


# Stages of results from before the checks were tests.


def _sanitizer(results: Results) -> Iterator[Bar]:
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        errors, ended = get(results, tool, "errors"), bool(get(results, tool, "ended"))
        text = _MISSING if errors is None else f"{errors} errors in {results[tool]['cases']} cases"
        yield Bar(f"compute-sanitizer {tool}", text, "0 errors", None if errors is None else errors == 0 and ended)


def _operators(results: Results) -> Iterator[Bar]:
    failures = len(results["stage"].get("failures", []))
    complete = results["stage"]["status"] == "ok"
    passed = False if failures else True if complete else None
    yield Bar("values, opcheck, graphs, streams, repeats", f"{failures} failures", "0 failures", passed)


def _power(results: Results) -> Iterator[Bar]:
    networks = [name for name, entry in results.items() if isinstance(entry, dict) and "multiply_adds" in entry]
    for name in networks or ["networks"]:
        floors = get(results, name, "fp32", "power_step", "times_larger_floor")
        yield _below(f"{name}: fp32 kernels / larger floor", floors, 2.5)
        published = get(results, name, "peers", "published")
        yield _above(f"{name}: eager published loop / refresh", get(published, "host_times_sn_fast"), 20)
        yield _above(f"{name}: its CUDA graph / refresh as a graph", get(published, "graph_times_sn_fast"), 6)


def _updates(results: Results) -> Iterator[Bar]:
    for size in [size for size in results if size.startswith("large")] or ["large"]:
        for norm, share in (("inf", 0.85), ("2", 0.75)):
            entry = get(results, size, "float32", f"pgd_step {norm}")
            yield _above(f"pgd_step {norm}, {size}: of copy bandwidth", get(entry, "of_copy"), share, percent=True)
            yield _above(f"pgd_step {norm}, {size}: eager / sn_fast", get(entry, "eager_times_sn_fast"), 4)


def _training(results: Results) -> Iterator[Bar]:
    networks = [name for name, entry in results.items() if isinstance(entry, dict) and "batch" in entry]
    for name in networks or ["networks"]:
        for mode in ("eager", "compiled"):
            share = get(results, name, mode, "sn_share", "of_step", "device")
            what = f"{name}: refresh, normalised weights, gradient / PGD-10 step, {mode}"
            yield _below(what, share, 0.01, percent=True)


_BARS: dict[str, Callable[[Results], Iterator[Bar]]] = {
    "build": _build,
    "tests": _tests,
    "sanitizer": _sanitizer,
    "operators": _operators,
    "power": _power,
    "updates": _updates,
    "training": _training,
}


def summary(content: Results, ran: Sequence[str]) -> tuple[str, int]:
    """The table of the stages that ``ran``, and how many bars were missed. A rehearsal is not judged."""
    stages = {name: content["stages"][name] for name in ran}
    rehearsal = bool(content.get("rehearsal"))
    lines = list(bars(stages))
    rows = [("", "measured", "wanted", "")]
    rows += [(bar.what, bar.measured, bar.wanted, "rehearsed" if rehearsal else bar.verdict) for bar in lines]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    text = [content["device"] + (" (the times mean nothing)" if rehearsal else "")]
    text += ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]).rstrip() for row in rows]
    for name, entry in stages.items():
        failures = entry["failures"]
        text.append(f"stage {name}: {entry['status']}" + (f", {len(failures)} failures" if failures else ""))
        text += [f"  {failure}" for failure in failures[:10]]
    return "\n".join(text), 0 if rehearsal else sum(bar.passed is False for bar in lines)


def _below(what: str, value: float | None, limit: float, percent: bool = False) -> Bar:
    passed = None if value is None else value <= limit
    return Bar(what, _number(value, percent), f"<= {_number(limit, percent)}", passed)


def _above(what: str, value: float | None, limit: float, percent: bool = False) -> Bar:
    passed = None if value is None else value >= limit
    return Bar(what, _number(value, percent), f">= {_number(limit, percent)}", passed)


def _number(value: float | None, percent: bool) -> str:
    return _MISSING if value is None else f"{value:.1%}" if percent else f"{value:.2f}x"
