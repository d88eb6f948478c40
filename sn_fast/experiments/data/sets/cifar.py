"""CIFAR-10 and CIFAR-100: pickled batches in a folder, or in the archive that they come in."""

from __future__ import annotations

import pickle
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....errors import OptionError, UserError
from ..pickles import load_arrays
from ..registry import DataSet, Images, Request, register
from ..source_files import Origin, check_sum, read_file

SHAPE = (3, 32, 32)
VALUES = 3 * 32 * 32
# The official ones hold up to 155 MB; a rebuilt one may take more in another protocol.
LARGEST = 400_000_000


@dataclass(frozen=True)
class Cifar:
    """One of the two sets: its files' MD5 sums by name, training first, and the keys and numbers of its labels."""

    origin: Origin
    folder: str
    archive: str
    train: dict[str, str]
    test: dict[str, str]
    labels: str
    classes: int
    coarse_labels: str = ""
    coarse_classes: int = 0

    def read(self, request: Request) -> tuple[Images, Images]:
        """The training images, batch after batch, and the test images."""
        place = self._locate(request.root)
        official = self.train | self.test
        files = self._in_archive(place) if place.is_file() else self._in_folder(place)
        found: dict[str, tuple[str, bytes]] = {}
        for name, where, content in files:
            found[name] = (where, content)
        absent = [name for name in official if name not in found]
        if absent and not request.allow_partial:
            raise UserError(
                f"data set {self.origin.name}: {place} lacks {', '.join(absent)}; add the official files from "
                f"{self.origin.source}, or take the batches that are there with `allow_partial`"
            )
        for part in (self.train, self.test):
            if not any(name in found for name in part):
                raise self.origin.missing(" or ".join(part), place, (".",))
        batches = {}
        for name in [name for name in official if name in found]:
            where, content = found.pop(name)
            if not request.allow_partial:
                check_sum(self.origin, where, content, official[name], official=official)
            batches[name] = self._batch(where, content, request.coarse)
        train, test = ([batches[name] for name in part if name in batches] for part in (self.train, self.test))
        return _joined(train), _joined(test)

    def _locate(self, root: Path) -> Path:
        """The folder with the batches, or the archive."""
        if root.is_file():
            return root
        for folder in (root / self.folder, root):
            if any((folder / name).is_file() for name in self.train | self.test):
                return folder
        if (root / self.archive).is_file():
            return root / self.archive
        archives = sorted(root.glob(self.archive.replace("python", "*")))
        if len(archives) > 1:
            names = ", ".join(archive.name for archive in archives)
            raise OptionError("root", str(root), f"holds {names}; give the one to read")
        if archives:
            return archives[0]
        raise self.origin.missing(f"{self.folder}/{next(iter(self.train))} or {self.archive}", root, (".",))

    def _in_folder(self, folder: Path) -> Iterator[tuple[str, str, bytes]]:
        for name in self.train | self.test:
            if (folder / name).is_file():
                yield name, str(folder / name), read_file(self.origin, folder / name, LARGEST)

    def _in_archive(self, path: Path) -> Iterator[tuple[str, str, bytes]]:
        """The batches in a tar file, read in place: nothing is unpacked to the disk."""
        try:
            with tarfile.open(path) as archive:
                for member in archive:
                    name = member.name.rpartition("/")[2]
                    if not member.isreg() or name not in self.train | self.test:
                        continue
                    where = f"{path}: {name}"
                    if member.size > LARGEST:
                        raise self.origin.damaged(where, f"holds more than {LARGEST} bytes")
                    file = archive.extractfile(member)
                    yield name, where, file.read() if file else b""
        except (tarfile.TarError, EOFError, zlib.error):
            raise self.origin.damaged(path, "is no tar archive, or is cut or damaged") from None
        except OSError as error:  # of the disk, or of gzip's check sum
            raise UserError(f"data set {self.origin.name}: cannot read {path}: {error.strerror or error}") from None

    def _batch(self, where: str, content: bytes, coarse: bool) -> Images:
        try:
            batch = load_arrays(content)
        except pickle.UnpicklingError as error:
            raise self.origin.damaged(where, f"is no batch of images: {error}") from None
        key, classes = (self.coarse_labels, self.coarse_classes) if coarse else (self.labels, self.classes)
        pixels, given = (_entry(batch, name) for name in ("data", key))
        if pixels is None or given is None:
            raise self.origin.damaged(where, f"is no batch of images: it lacks {'data' if pixels is None else key}")
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (VALUES,):
            raise self.origin.damaged(where, f"is no batch of images: data are not bytes of shape (N, {VALUES})")
        labels = _whole_numbers(given)
        if labels is None or labels.ndim != 1:
            raise self.origin.damaged(where, f"is no batch of images: {key} are not whole numbers")
        if len(labels) != len(pixels):
            raise self.origin.damaged(where, f"has {len(labels)} labels of {len(pixels)} images")
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise self.origin.damaged(where, f"holds the label {wrong}; {key} are 0 to {classes - 1}")
        return Images(pixels.reshape(-1, *SHAPE), labels)


def _entry(batch: Any, key: str) -> Any:
    """An entry by its key, which is bytes in the official files and may be text in rebuilt ones."""
    return batch.get(key.encode(), batch.get(key)) if isinstance(batch, dict) else None


def _whole_numbers(values: Any) -> np.ndarray | None:
    if not isinstance(values, list | tuple | np.ndarray):
        return None
    if not isinstance(values, np.ndarray) and not all(isinstance(value, int | np.integer) for value in values):
        return None
    array = np.asarray(values)
    return array.astype(np.int64) if array.dtype.kind in "ui" or not array.size else None


def _joined(batches: list[Images]) -> Images:
    return Images(np.concatenate([b.pixels for b in batches]), np.concatenate([b.labels for b in batches]))


CIFAR10 = Cifar(
    Origin("cifar10", "www.cs.toronto.edu/~kriz/cifar.html (CIFAR-10 python version)"),
    folder="cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    train={
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    test={"test_batch": "40351d587109b95175f43aff81a1287e"},
    labels="labels",
    classes=10,
)

CIFAR100 = Cifar(
    Origin("cifar100", "www.cs.toronto.edu/~kriz/cifar.html (CIFAR-100 python version)"),
    folder="cifar-100-python",
    archive="cifar-100-python.tar.gz",
    train={"train": "16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    labels="fine_labels",
    classes=100,
    coarse_labels="coarse_labels",
    coarse_classes=20,
)

PUBLISHED = {"whiten": True, "crop": 28}
register(DataSet("cifar10", CIFAR10.read, official=True, published=PUBLISHED))
register(DataSet("cifar100", CIFAR100.read, official=True, num_classes=100, coarse_classes=20, published=PUBLISHED))
