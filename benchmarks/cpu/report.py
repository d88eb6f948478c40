"""The tables of docs/benchmarks_cpu.md and their figure, from the data: never typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sn_fast.experiments import figures
from sn_fast.files import replace_file

from ..gpu_check.report import table as markdown
from ..gpu_check.results import ROOT
from . import data

BEGIN, END = "<!-- generated: python -m benchmarks.cpu --report -->", "<!-- end of generated part -->"
DOCUMENT = ROOT / "docs" / "benchmarks_cpu.md"
FIGURE = ROOT / "docs" / "results" / "cpu_cost_curves.png"
_NONE = "–"


def write(document: Path = DOCUMENT, folder: Path = data.FOLDER, figure: Path | None = FIGURE) -> None:
    """Renew the document, and the figure of the cost curves where they were measured."""
    text = document.read_text(encoding="utf-8")
    replace_file(document, with_tables(text, folder).encode())
    curves = data.read(folder / "curves.json")
    if curves and figure is not None:
        replace_file(figure, plot(curves["rows"]))


def with_tables(text: str, folder: Path = data.FOLDER) -> str:
    """A document with the part between its marks made anew."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the document must have one {BEGIN!r} and one {END!r}")
    before, _, rest = text.partition(BEGIN)
    parts = []
    for name, (title, make) in _SECTIONS.items():
        found = data.read(folder / f"{name}.json")
        body = "\n".join(make(found)) if found else f"Not measured yet: `python -m benchmarks.cpu {name}`."
        parts.append(f"### {title}\n\n{body}\n\n{_source(name, found)}".rstrip())
    generated = "\n\n".join(parts)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{rest.partition(END)[2]}"


def _source(name: str, found: Mapping[str, Any]) -> str:
    if not found:
        return ""
    machine, versions, rows = found["machine"], found["versions"], found["rows"].values()
    packages = ", ".join(f"{package} {version}" for package, version in versions.items() if version)
    loads = [row["load"] for row in rows if row["load"] is not None]
    busy = f"load {min(loads):.1f} to {max(loads):.1f}" if loads else "load unknown"
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread"
    left_out = "" if found["finished"] else "; some rows are not measured yet"
    return f"*`{name}.json`: {where}, {busy}; {packages}; commit {found['commit']}, {found['date']}{left_out}.*"


# -- cells ------------------------------------------------------------------------------------------------------------


def number(x: float | None) -> str:
    """Three digits."""
    if x is None:
        return _NONE
    if x >= 1e5 or (x and abs(x) < 1e-3):
        return f"{x:.1e}"
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _time(cell: Mapping[str, Any]) -> str:
    """Median, and the quartiles where there were several turns."""
    if "cpu_ms" not in cell:
        return _why(cell)
    t = cell["cpu_ms"]
    middle = f"{number(t['median'])} ms"
    return middle if cell["turns"] < 3 else f"{middle} ({number(t['q1'])}..{number(t['q3'])})"


def _ratio(cell: Mapping[str, Any]) -> str:
    return f"{cell['ratio']['median']:.2f}" if "ratio" in cell else _NONE


def _why(cell: Mapping[str, Any]) -> str:
    if "missing" in cell:
        return "not installed"
    if "not_offered" in cell:
        return "not offered"
    return str(cell.get("error", _NONE))


def _truth(ok: bool | None) -> str:
    return {True: "yes", False: "no", None: _NONE}[ok]


def _notes(found: Mapping[str, Any]) -> Iterator[str]:
    """Why cells are empty, once each."""
    seen = []
    for key, row in found["rows"].items():
        for name, cell in row["methods"].items():
            if "error" in cell:
                text = f"- {name}, {key}: {cell['error']}: {cell['message']}"
            elif "not_offered" in cell:
                text = f"- {name} does not offer {cell['not_offered']}"
            elif "missing" in cell:
                text = f"- {name}: {cell['missing']}"
            else:
                continue
            if text not in seen:
                seen.append(text)
    if seen:
        yield ""
        yield from seen


# -- one table each ---------------------------------------------------------------------------------------------------


def _refresh(found: Mapping[str, Any]) -> Iterator[str]:
    methods = found["facts"]["methods"]
    for name, row in found["rows"].items():
        yield f"**{name}**, {row['layers']} layers:"
        yield ""
        lines = []
        for method, cell in row["methods"].items():
            if "not_offered" in cell or "missing" in cell:
                continue
            value = " to ".join(f"{x:.3f}" for x in cell["over_truth"]) if "over_truth" in cell else _NONE
            lines.append((method, _time(cell), _ratio(cell), value, _truth(methods[method]["true_norm"])))
        yield from markdown(("", "time", "/ sn_fast", "divides by / true norm", "true norm?"), lines)
        yield ""
    yield from (f"- {name}: {fact['computes']}" for name, fact in methods.items() if fact["true_norm"] is not None)
    yield from _notes(found)


def _steps(found: Mapping[str, Any]) -> Iterator[str]:
    names = [
        n for n in found["facts"]["methods"] if any("ratio" in r["methods"].get(n, {}) for r in found["rows"].values())
    ]
    lines = []
    for key, row in found["rows"].items():
        cells = [row["methods"].get(n, {}) for n in names]
        lines.append((key, _time(cells[0]), *(_ratio(c) if "ratio" in c else _why(c) for c in cells[1:])))
    yield from markdown(("step, batch 8", f"{names[0]}", *(f"{n} / {names[0]}" for n in names[1:])), lines)
    yield from _notes(found)


def _methods(column: str, value: Any, first: str, *, ratio: bool = True) -> Any:
    """A table of one line per row and method: a value, a time, and the time's ratio to that of the first method."""

    def make(found: Mapping[str, Any]) -> Iterator[str]:
        lines = []
        for key, row in found["rows"].items():
            for i, (name, cell) in enumerate(row["methods"].items()):
                cells = key if not i else "", name, value(cell), _time(cell)
                lines.append((*cells, _ratio(cell)) if ratio else cells)
        yield from markdown((first, "", column, "time", *(["/ first"] if ratio else [])), lines)
        yield from _notes(found)

    return make


def _curves(found: Mapping[str, Any]) -> Iterator[str]:
    lines = [
        (key, row["what"], f"{row['values'][0]} to {row['values'][-1]}", name, number(m["cpu_ms"][0]) + " ms",
         number(m["cpu_ms"][-1]) + " ms", f"{m['slope']:.2f}")
        for key, row in found["rows"].items()
        for name, m in row["methods"].items()
    ]  # fmt: skip
    yield from markdown(("", "of", "from .. to", "", "first", "last", "slope"), lines)
    yield ""
    yield f"![time against layers, channels, input size and batch](results/{FIGURE.name})"


def _footprint(found: Mapping[str, Any]) -> Iterator[str]:
    lines = [
        (key, ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("load", "seconds", "message")))
        for key, row in found["rows"].items()
    ]
    yield from markdown(("", "measured"), lines)


def _error(cell: Mapping[str, Any]) -> str:
    return number(cell["largest_error"]) if "largest_error" in cell else _why(cell)


def _success(cell: Mapping[str, Any]) -> str:
    return f"{100 * cell['success']:.1f} %" if "success" in cell else _why(cell)


def _over_truth(cell: Mapping[str, Any]) -> str:
    return f"{cell['over_truth']:.4f}" if "over_truth" in cell else _why(cell)


def _value(cell: Mapping[str, Any]) -> str:
    return number(cell["value"]) if "value" in cell else _why(cell)


_SECTIONS: dict[str, tuple[str, Any]] = {
    "refresh": ("The norms of all layers, after a change of the weights", _refresh),
    "steps": ("Whole training steps", _steps),
    "updates": ("Ten updates of an attack", _methods("largest error", _error, "update")),
    "attacks": ("Whole attacks, equal gradients", _methods("success", _success, "attack")),
    "certificates": ("Upper bounds of single layers", _methods("bound / true norm", _over_truth, "layer", ratio=False)),
    "networks": ("Lipschitz constants of whole networks", _methods("value", _value, "network", ratio=False)),
    "curves": ("How costs grow", _curves),
    "footprint": ("Import, installation, memory", _footprint),
}


# -- the figure -------------------------------------------------------------------------------------------------------


def plot(rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A panel per curve, both axes logarithmic, with the slopes in the legends; PNG."""
    with figures.style():
        figure, axes = figures.panels(len(rows), 2)
        for ax, (key, row) in zip(axes, rows.items()):
            for i, (name, m) in enumerate(row["methods"].items()):
                label = f"{name}: slope {m['slope']:.2f}"
                ax.loglog(row["values"], m["cpu_ms"], label=label, **figures.series(i))
            ax.set_xlabel(row["what"].split(",")[0])
            ax.set_ylabel("ms on one thread")
            ax.set_title(key)
            ax.legend()
        return figures.encoded(figure, "png")
