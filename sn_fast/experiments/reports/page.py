"""The report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from .. import figures
from ..analysis import Analysis, Table
from .reproduce import Report

_MOST_ROWS = 60
"""Of a table in the page; the CSV files have all."""

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; } img { background: #fff; height: auto; max-width: 100%; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #8884; padding: 0.2rem 0.6rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.note { opacity: 0.75; font-size: 0.9rem; }
"""

_HEADINGS = {
    "accuracy": "Accuracy over beta, beside the published values",
    "training": "Training curves",
    "robustness": "Robustness curves",
    "margins": "Margins",
    "gradients": "Gradient norms",
    "gain": "Norm gain",
    "images": "Perturbed images",
    "random-labels": "Fitting random labels",
    "norms": "Layer norms after training",
    "capacities": "Capacities beside measured gaps",
}


def html_page(report: Report) -> str:
    """All tables and figures of a report; the figures are embedded."""
    unfinished = "".join(
        f"<li>{html.escape(f'{o.config.key()}: {o.status} {o.reason}'.rstrip())}</li>" for o in report.unfinished
    )
    missing = "".join(f"<li>no {html.escape(f'{name}: {why}')}</li>" for name, why in report.missing.items())
    notes = f"<h2>Not there</h2>\n<ul>{unfinished}{missing}</ul>" if unfinished or missing else ""
    remarks = _list(report.notes)
    sections = "\n".join(_section(name, analysis) for name, analysis in report.analyses.items())
    title = html.escape(report.title)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # browsers would look for a file of their own
        f"<title>sn-fast reproduce: {title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n{remarks}\n{sections}\n{notes}\n</body>\n</html>\n"
    )


def _section(name: str, analysis: Analysis) -> str:
    heading = next((text for key, text in _HEADINGS.items() if name == key or name.startswith(f"{key}-")), name)
    detail = next((name[len(key) + 1 :] for key in _HEADINGS if name.startswith(f"{key}-")), "")
    image = base64.b64encode(figures.encoded(analysis.figure(), "png")).decode()
    text = html.escape(f"{heading}, {detail}" if detail else heading)
    opened = name == "accuracy"  # what the other sections explain
    tables = "\n".join(_table(suffix, table, opened and not suffix) for suffix, table in analysis.tables().items())
    return (
        f'<section>\n<h2>{text}</h2>\n<figure><img alt="{text}" src="data:image/png;base64,{image}"></figure>\n'
        f"{_list(analysis.notes())}\n{tables}\n</section>"
    )


def _list(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f'<ul class="note">{items}</ul>' if notes else ""


def _table(suffix: str, table: Table, opened: bool) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(cell))}</td>" for cell in row) + "</tr>"
        for row in table.rows[:_MOST_ROWS]
    )
    more = len(table.rows) - _MOST_ROWS
    note = f'<p class="note">{more} more rows in the CSV file.</p>' if more > 0 else ""
    summary = html.escape(f"numbers ({suffix})" if suffix else "numbers")
    return (
        f"<details{' open' if opened else ''}><summary>{summary}</summary>\n"
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>{note}</details>"
    )


def _cell(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:.5g}" if isinstance(cell, float) else str(cell)
