"""What every analysis gives: plain numbers, as rows and as a figure, and the files of both."""

from __future__ import annotations

import csv
import io
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from ...errors import OptionError, UserError
from ...files import replace_file
from .. import figures
from ..data import Samples

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | None
Row = tuple[Cell, ...]


class Table(NamedTuple):
    """Rows with a name for each column; None where there is no value."""

    columns: tuple[str, ...]
    rows: list[Row]

    def csv(self) -> str:
        """Numbers are written in full: they are read back as they were."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_written(cell) for cell in row] for row in self.rows)
        return text.getvalue()

    def text(self) -> str:
        """Columns under each other, the first at the left, numbers with four digits behind the point."""
        cells = [self.columns, *([_shown(cell) for cell in row] for row in self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))])
            for row in cells
        )


class Analysis(ABC):
    """The result of an analysis."""

    columns: ClassVar[tuple[str, ...]]
    """Names of the columns of ``rows``."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """All numbers of the result, in plain rows."""

    def tables(self) -> dict[str, Table]:
        """The tables of the result by the suffix of their file; that of ``rows`` has none."""
        return {"": Table(self.columns, self.rows())}

    def notes(self) -> list[str]:
        """What a reader of the numbers must know, each a sentence for a report."""
        return []

    def csv(self) -> str:
        """``rows`` as a CSV file with a header."""
        return self.tables()[""].csv()

    def figure(self) -> Figure:
        """The result, drawn."""
        with figures.style():
            return self._draw()

    @abstractmethod
    def _draw(self) -> Figure: ...


def write_analysis(analysis: Analysis, folder: str | os.PathLike[str], name: str) -> list[Path]:
    """Write an analysis to NAME.png, NAME.svg and NAME.csv (and NAME-summary.csv, ... if it has several tables).

    Each file is replaced as a whole; equal results give equal bytes.

    Args:
        folder: made if it does not exist.
        name: of the files, without a suffix.

    Returns:
        The paths of the files.

    Raises:
        UserError: a file cannot be written.
    """
    if not name or Path(name).name != name:
        raise OptionError("name", name, "give a file name without a folder")
    figure = analysis.figure()
    contents = {f"{name}.{form}": figures.encoded(figure, form) for form in ("png", "svg")}
    for suffix, table in analysis.tables().items():
        contents[f"{name}{'-' if suffix else ''}{suffix}.csv"] = table.csv().encode()
    paths = []
    for file, content in contents.items():
        path = Path(folder, file)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write {path}: {reason}; free some space or give another folder") from None
        paths.append(path)
    return paths


def check_networks(networks: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise OptionError unless there is a network in each panel."""
    if not networks or not all(networks.values()):
        empty = next((panel for panel, members in networks.items() if not members), networks)
        raise OptionError("networks", empty, "give at least one network for each panel")


def check_samples(samples: Samples) -> None:
    """Raise OptionError if there are none."""
    if not len(samples):
        raise OptionError("samples", "0 images", "give at least one")


def mean(values: Sequence[float]) -> float | None:
    """None of no values."""
    return math.fsum(values) / len(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample (over n - 1); None of fewer than two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def finite(value: float) -> float | None:
    """None of nan and infinity: a cell that has no value."""
    return float(value) if math.isfinite(value) else None


def _written(cell: Cell) -> Any:
    return "" if cell is None else repr(cell) if isinstance(cell, float) else cell


def _shown(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:g}" if math.isinf(cell) or (cell == int(cell) and abs(cell) > 1) else f"{cell:.4f}"
    return "-" if cell is None else str(cell)
