"""What holds of every figure, and of its files."""

from __future__ import annotations

import csv
import io
import math
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.image
from matplotlib.backends.backend_agg import FigureCanvasAgg

from sn_fast.experiments.analysis import Analysis, write_analysis


def check_figure(analysis: Analysis, *, images: bool = False) -> None:
    """Axes have labels and titles; every text is within the figure; the legend lies on no axes."""
    figure = analysis.figure()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.bbox
    assert figure.get_suptitle()
    texts = [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        if not images:
            assert axes.get_ylabel() or axes.get_yticklabels()
            assert axes.get_xlabel() or axes.get_xticklabels()
        texts += [axes.title, axes.xaxis.label, axes.yaxis.label]
    for text in texts:
        box = text.get_window_extent(renderer)
        inside = page.x0 - 1 <= box.x0 and box.x1 <= page.x1 + 1 and page.y0 - 1 <= box.y0 and box.y1 <= page.y1 + 1
        assert inside or not text.get_text(), text.get_text()
    for legend in figure.legends:
        box = legend.get_window_extent(renderer)
        assert page.x0 - 1 <= box.x0
        assert box.x1 <= page.x1 + 1
        assert not any(box.overlaps(axes.get_window_extent(renderer)) for axes in figure.axes)
    for axes in figure.axes:
        boxes = [label.get_window_extent(renderer) for label in axes.get_xticklabels() if label.get_text()]
        upright = not any(label.get_rotation() for label in axes.get_xticklabels())
        assert not upright or all(a.x1 <= b.x0 for a, b in pairwise(boxes)), "labels of ticks meet"
        labels = [*axes.get_yticklabels(), *axes.get_yticklabels(minor=True)]
        heights = sorted((box.y0, box.y1) for t in labels if t.get_text() for box in [t.get_window_extent(renderer)])
        room = [(low, high) for low, high in heights if high > axes.bbox.y0 and low < axes.bbox.y1]
        assert all(a[1] <= b[0] + 1 for a, b in pairwise(room)), "labels of ticks meet"
    titles = [axes.title.get_window_extent(renderer) for axes in figure.axes if axes.get_title()]
    assert not any(a.overlaps(b) for i, a in enumerate(titles) for b in titles[:i])


def check_files(analysis: Analysis, folder: Path) -> None:
    """PNG and SVG are valid; the CSV files hold the numbers to the last bit."""
    paths = write_analysis(analysis, folder, "it")
    assert {p.name for p in paths} == {p.name for p in folder.iterdir()}
    pixels = matplotlib.image.imread(folder / "it.png")
    assert pixels.shape[0] > 100
    assert pixels[..., :3].std() > 0.01
    root = ElementTree.parse(folder / "it.svg").getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 5
    for suffix, table in analysis.tables().items():
        text = (folder / f"it{suffix and '-'}{suffix}.csv").read_text()
        columns, *rows = csv.reader(io.StringIO(text))
        assert tuple(columns) == table.columns
        assert len(set(columns)) == len(columns)
        assert len(rows) == len(table.rows)
        for written, row in zip(rows, table.rows):
            assert len(row) == len(columns)
            assert all(_same(text, cell) for text, cell in zip(written, row))


def _same(text: str, cell: object) -> bool:
    if cell is None:
        return text == ""
    if isinstance(cell, float):
        return float(text) == cell or math.isnan(cell)
    return text == str(cell)
