"""A plot of an inspection: per layer the certified norm, and the reshaped kernel's beside it."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError, require
from ..files import replace_file
from ..layers.describe import times
from .layers import Inspection, LayerMeasurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".pdf", ".svg")
_TRUE_COLOUR, _INTERVAL_COLOUR, _RESHAPED_COLOUR = "#0072B2", "#000000", "#E69F00"  # Okabe and Ito's
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
_DPI = 150
_TITLE = "sn-fast norms"  # in the file's metadata, by which a later run knows that it may replace the plot
TITLE_OF_ATTACKS = "sn-fast attack"
_LONGEST_NAME = 60
_HEIGHT, _MOST_INCHES = 0.27, 200.0
_LOGARITHMIC = 50.0  # ratio of the largest to the smallest norm from which bars of one length scale hide the small ones


def check_plot(path: Path) -> None:
    """Before the work: raise UserError unless a plot can be written there."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"argument `path`: invalid value {path}: the name must end with {', '.join(FORMATS)}")
    try:
        if not path.parent.is_dir():
            raise UserError(f"argument `path`: there is no folder {path.parent}")
        exists = _exists(path)
    except OSError as error:
        raise UserError(f"argument `path`: cannot write {path}: {error.strerror}") from None
    if exists and not _is_ours(path):
        raise UserError(f"argument `path`: {path} exists and is not a plot of sn-fast, so it stays; give another name")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"argument `path`: cannot write into {path.parent}: permission denied")
    require("matplotlib", install="matplotlib")


def plot(inspection: Inspection, path: Path, title: str = "") -> None:
    """Write the plot to an image file (png, pdf, svg).

    Raises:
        UserError: no layer is measured, matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    layers = inspection.measured()
    if not layers:
        raise UserError("argument `path`: no layer has a measured norm, so there is nothing to draw")
    image = io.BytesIO()
    with require("matplotlib").rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in letters that the font lacks shows as boxes
        figure = _draw(layers, title.encode("utf-8", "replace").decode())
        figure.savefig(image, dpi=_DPI, format=path.suffix.lstrip(".").lower(), metadata={"Title": _TITLE})
    try:
        replace_file(path, image.getvalue())
    except OSError as error:
        raise UserError(f"argument `path`: cannot write {path}: {error.strerror}") from None


def _draw(layers: tuple[LayerMeasurement, ...], title: str) -> Figure:
    height = min(1.6 + _HEIGHT * len(layers), _MOST_INCHES)
    figure: Figure = require("matplotlib.figure").Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.subplots()
    lower, upper = [layer.lower or 0.0 for layer in layers], [layer.upper or 0.0 for layer in layers]
    values = [v for v in (*upper, *(layer.reshaped or 0.0 for layer in layers)) if v > 0]
    logarithmic = bool(values) and max(values) > _LOGARITHMIC * min(values)
    left = min(values) / 2 if logarithmic else 0.0
    y = range(len(layers))
    # With a reshaped kernel beside it a bar has half the room.
    halves = [0.4 if layer.reshaped is not None else 0.8 for layer in layers]
    centres = [i - 0.2 if layer.reshaped is not None else float(i) for i, layer in zip(y, layers)]
    axes.barh(centres, [u - left for u in upper], halves, left, color=_TRUE_COLOUR, label="true norm, certified")
    ends = [[0.0] * len(layers), [max(0.0, u - low) for low, u in zip(lower, upper)]]
    axes.errorbar(
        lower, centres, xerr=ends, fmt="none", ecolor=_INTERVAL_COLOUR, capsize=2, linewidth=1, label="its interval"
    )
    kernels = [(i, layer.reshaped) for i, layer in zip(y, layers) if layer.reshaped is not None]
    if kernels:
        axes.barh(
            [i + 0.2 for i, _ in kernels],
            [max(0.0, value - left) for _, value in kernels],
            0.4,
            left,
            color=_RESHAPED_COLOUR,
            label="norm of the reshaped kernel",
        )
    axes.set_yticks(y, [_label(layer) for layer in layers], fontsize="small")
    axes.set(ylim=(len(layers) - 0.4, -0.6), xlabel="spectral norm")
    if logarithmic:
        axes.set(xscale="log", xlim=(left, max(values) * 1.1))
    if title:
        figure.suptitle(title, fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def _exists(path: Path) -> bool:
    """Unlike Path.exists, True for a symbolic link to nowhere, and an OSError for a name that no file can have."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _is_ours(path: Path) -> bool:
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError:
        return False
    return any(title.encode() in content for title in (_TITLE, TITLE_OF_ATTACKS))


def _label(layer: LayerMeasurement) -> str:
    size = f" at {times(layer.input_size)}" if layer.input_size else ""
    name = layer.name.encode("utf-8", "replace").decode()
    if len(name) > _LONGEST_NAME:
        name = f"...{name[-_LONGEST_NAME:]}"
    return f"{name} ({layer.window}{size})"
