"""The data sets by name. A new one is a file in sets/ that registers how it is read."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError


@dataclass(frozen=True)
class Images:
    """Pixels (N, C, H, W), uint8, or float32 in [0, 1]; labels (N,), int64."""

    pixels: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        pixels, labels = self.pixels, self.labels
        if pixels.ndim != 4 or pixels.dtype not in (np.uint8, np.float32):
            raise ValueError(f"pixels of {pixels.dtype} and shape {pixels.shape}: give uint8 or float32, (N, C, H, W)")
        if labels.shape != pixels.shape[:1] or labels.dtype != np.int64:
            raise ValueError(f"labels of {labels.dtype} and shape {labels.shape}: give int64, ({len(pixels)},)")

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Request:
    """What a set's reader may need: ``root`` is the folder (or file) that the user named."""

    name: str
    root: Path
    allow_partial: bool
    coarse: bool
    train_size: int | None
    seed: int


@dataclass(frozen=True)
class DataSet:
    """How a data set is read, and what the published experiments do with it."""

    name: str
    read: Callable[[Request], tuple[Images, Images]]
    """The training and the test images, in the official order."""
    num_classes: int | None = 10
    """None: as many as the training images have."""
    embedded: bool = False
    """It ships inside a Python package and has no official split: ``read`` draws ``train_size`` images by ``seed``."""
    official: bool = False
    """Its images are the same in every folder: ``read`` checks the files' sums."""
    reserved: int = 0
    """So many first training images are not trained on."""
    validation: int = 500
    """So many first test images are for validation."""
    published: dict[str, Any] | None = None
    """Options of ``load_data`` with which the published experiments use it."""
    coarse_classes: int | None = None
    """Number of coarse classes, of a set that has those too."""
    like: str = "mnist"
    """The set whose defaults of training are this one's, where training has none for it."""


_SETS: dict[str, DataSet] = {}


def register(data_set: DataSet) -> DataSet:
    """Make a data set known to ``load_data`` by its name."""
    if data_set.name in _SETS:
        raise ValueError(f"a data set {data_set.name!r} is registered already")
    _SETS[data_set.name] = data_set
    return data_set


def data_set_names() -> tuple[str, ...]:
    """The names that ``load_data`` knows, embedded sets first."""
    _import_sets()
    return tuple(sorted(_SETS, key=lambda name: (not _SETS[name].embedded, name)))


def find_data_set(name: str) -> DataSet:
    """The data set of a name.

    Raises:
        UserError: there is none.
    """
    names = data_set_names()
    if name not in names:
        raise UserError(f"data set {name!r} is not known; there are {', '.join(names)}")
    return _SETS[name]


def published_options(name: str) -> dict[str, Any]:
    """Options of ``load_data`` that prepare a set as the published experiments do, such as ``whiten`` and ``crop``."""
    return dict(find_data_set(name).published or {})


def _import_sets() -> None:
    package = importlib.import_module(f"{__package__}.sets")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
