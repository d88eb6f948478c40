"""How the figures look: one style for those of a run and of the analyses, readable also in grey."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which the colour-blind can tell apart; without their yellow, which is faint on white."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "+++", "ooo")
GUIDE: dict[str, Any] = {"color": "0.35", "linewidth": 1.0}
"""Of lines that are no data: the eps trained with, a cap, zero."""
FAINT = 0.55
"""Opacity of what is shown beside the main thing, as training accuracy beside that on the test images."""

_STYLE = {
    "font.size": 10,
    "font.family": "DejaVu Sans",  # comes with matplotlib, and has the Greek letters and ℓ
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 2.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "figure.titlesize": 11.5,
    "hatch.linewidth": 0.6,
    "svg.hashsalt": "sn_fast",  # equal figures have equal bytes
}
_DPI = 150
_LETTER_INCHES = 0.078  # of a legend's text, on average
_HANDLE_INCHES = 0.62
_TITLE_INCHES = 0.092


@contextmanager
def style() -> Iterator[None]:
    """Figures made in this context have the style."""
    with require("matplotlib").rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    figure: Figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    return figure


def panels(
    count: int, columns: int | None = None, *, width: float = 3.9, height: float = 3.0, **sharing: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, each of about this size in inches; ``columns`` None: as fits a page."""
    wide = columns or {1: 1, 2: 2, 4: 2}.get(count, 3)
    rows = math.ceil(count / wide)
    figure = new_figure(max(width * wide, 6.4), height * rows + 0.9)
    axes = list(figure.subplots(rows, wide, squeeze=False, **sharing).flat)
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def encoded(figure: Figure, form: str, title: str = "") -> bytes:
    """The figure as a file of format "png" or "svg"; equal figures give equal bytes. ``title``: for its metadata."""
    image = io.BytesIO()
    metadata: dict[str, str | None] = {"Date": None} if form == "svg" else {}
    if title:
        metadata["Title"] = title
    with style():
        figure.savefig(image, dpi=_DPI, format=form, metadata=metadata)
    return image.getvalue()


def series(index: int) -> dict[str, Any]:
    """Colour, line and marker of the series with this number: each alone tells it from its neighbours."""
    return {"color": colour(index), "linestyle": line(index), "marker": marker(index)}


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    return MARKERS[_shifted(index)]


def line(index: int) -> Any:
    return LINES[_shifted(index)]


def hatch(index: int) -> str:
    return HATCHES[_shifted(index)]


def _shifted(index: int) -> int:
    """The eighth series has the first colour again, but not the first marker, line or hatch."""
    return (index + index // len(COLOURS)) % len(COLOURS)


def name_parts(axes: Axes) -> None:
    """In the legend: training is dashed and pale, the test solid."""
    axes.plot([], [], color="0.2", linestyle="--", alpha=FAINT, label="training")
    axes.plot([], [], color="0.2", linestyle="-", label="test")


def depth_colours() -> Colormap:
    """From the first layer to the last, darker to lighter, for more layers than a legend can name."""
    colours = require("matplotlib.colors")
    shades = require("matplotlib").colormaps["viridis"]
    # The brightest end would be lost on white.
    found: Colormap = colours.LinearSegmentedColormap.from_list("depth", [shades(i / 20) for i in range(18)])
    return found


def depth_bar(figure: Figure, axes: Sequence[Axes], layers: int) -> None:
    """A colour bar that says which of so many layers a colour of ``depth_colours`` is."""
    colours = require("matplotlib.colors")
    mappable = require("matplotlib.cm").ScalarMappable(colours.Normalize(1, max(2, layers)), depth_colours())
    figure.colorbar(mappable, ax=list(axes), label=f"layer, in order of use (1 to {layers})", pad=0.02)


def look_of(names: Iterable[str]) -> dict[str, int]:
    """A number for each name's ``series``: the network without normalisation has the first in every figure."""
    plain = beta_label(math.inf)
    return {name: i for i, name in enumerate(sorted(dict.fromkeys(names), key=lambda name: name != plain))}


def panel_title(axes: Axes, *lines: str, width: float = 3.5) -> None:
    """The title of a panel, above its axes of this width in inches, each of ``lines`` folded."""
    axes.set_title("\n".join(folded(line, int(width / _LETTER_INCHES)) for line in lines))


def titled(figure: Figure, title: str) -> None:
    """A title above all panels, in as many lines as its length needs."""
    room = max(20, int((figure.get_figwidth() - 0.3) / _TITLE_INCHES))
    figure.suptitle(folded(title, room))


def legend_below(figure: Figure, axes: Iterable[Axes], *, last: str = "") -> None:
    """One legend of all panels, below them, where it covers no data; each label once.

    The network without normalisation comes first, the label ``last`` at the end.
    """
    entries: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    if not entries:
        return
    if (plain := beta_label(math.inf)) in entries:
        entries = {plain: entries[plain], **entries}
    if last in entries:
        entries[last] = entries.pop(last)
    widest = max(len(line) for label in entries for line in label.splitlines())
    room = (figure.get_figwidth() - 0.4) / (widest * _LETTER_INCHES + _HANDLE_INCHES)
    columns = max(1, min(len(entries), int(room)))
    columns = math.ceil(len(entries) / math.ceil(len(entries) / columns))  # rows of about equal length
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)


def beta_label(beta: float) -> str:
    """The cap of a network in a legend."""
    return f"β = {beta:g}" if math.isfinite(beta) else "no SN (β = ∞)"


def norm_label(norm: str) -> str:
    """ "ℓ2", "ℓ∞"."""
    return f"ℓ{norm.replace('inf', '∞')}"


def eps_label(scheme: str, norm: str) -> str:
    """The strength of an attack, on an axis."""
    return "ε = 1/(2γ) of WRM" if scheme == "wrm" else f"ε of the attack ({norm_label(norm)}, in units of the input)"


def percent(values: Iterable[float | None]) -> list[float]:
    """Shares in %, with gaps where there is none."""
    return [math.nan if value is None else 100 * value for value in values]


def accuracy_axis(axes: Axes, label: str = "accuracy (%)") -> None:
    """All of 0 to 100 %, with room for markers."""
    axes.set(ylim=(-2, 102), ylabel=label)


def logarithmic(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis, also on one of less than a decade: 0.5 and not 5 x 10^-1."""
    formatter: Any = require("matplotlib.ticker").LogFormatter

    class Plain(formatter):
        def __call__(self, value: float, place: int | None = None) -> str:
            return f"{value:g}" if super().__call__(value, place) else ""  # labels as many ticks as have room

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


def number_ticks(axes: Axes, values: Sequence[int]) -> None:
    """A logarithmic axis with these values on it, as plain numbers."""
    axes.set_xscale("log")
    axes.set_xticks(list(values), [f"{value:,}" for value in values])
    axes.minorticks_off()


def folded(text: str, room: int) -> str:
    """Text in lines of at most so many letters."""
    return textwrap.fill(text, room, break_long_words=False)
