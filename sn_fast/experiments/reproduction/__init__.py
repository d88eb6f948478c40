"""The paper's tables and figures anew: grids of runs, their store, and what was published."""

from .grid import PUBLISHED, Grid, Outcome, Store
from .published import PublishedRow, published_row, published_row_of, published_rows
from .runner import compute, describe

__all__ = [
    "PUBLISHED",
    "Grid",
    "Outcome",
    "PublishedRow",
    "Store",
    "compute",
    "describe",
    "published_row",
    "published_row_of",
    "published_rows",
]
