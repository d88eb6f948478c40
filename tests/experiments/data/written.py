"""Drawn images in the official formats, written to files."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sn_fast.experiments.data.idx import IdxSet
from sn_fast.experiments.data.registry import Request
from sn_fast.experiments.data.sets.cifar import CIFAR10, CIFAR100, Cifar
from sn_fast.experiments.data.source_files import Origin, md5_of


def request(root: Path, **options: Any) -> Request:
    return Request(
        **{"name": "x", "root": root, "allow_partial": False, "coarse": False, "train_size": None, "seed": 0, **options}
    )


def idx(array: np.ndarray) -> bytes:
    """The format as yann.lecun.com/exdb/mnist describes it."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


COUNTS = {"train": 37, "t10k": 23}


@dataclass
class IdxFiles:
    """Files of a small set in MNIST's format, and the reader that takes them for the official ones."""

    folder: Path
    arrays: dict[str, np.ndarray]
    reader: IdxSet

    def path(self, name: str, suffix: str = "") -> Path:
        kind = name.partition("-")[2]
        return self.folder / f"{name}-idx{3 if kind == 'images' else 1}-ubyte{suffix}"

    def content(self, name: str) -> bytes:
        return idx(self.arrays[name])

    def write(self, suffix: str = "") -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in self.arrays:
            content = self.content(name)
            self.path(name, suffix).write_bytes(gzip.compress(content, 1) if suffix == ".gz" else content)


def idx_files(folder: Path, seed: int = 0) -> IdxFiles:
    rng = np.random.default_rng(seed)
    arrays = {}
    for part, count in COUNTS.items():
        arrays[f"{part}-images"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}-labels"] = rng.integers(0, 10, count, np.uint8)
    sums = {name: md5_of(idx(array)) for name, array in arrays.items()}
    origin = Origin("drawn", "nowhere.example")
    return IdxFiles(folder, arrays, IdxSet(origin, (".", "drawn", "Drawn/raw"), dict(COUNTS), sums))


def cifar_batch(rng: np.random.Generator, count: int, labels: dict[str, int]) -> dict[bytes, Any]:
    """A batch as the official ones are: keys in bytes, labels in lists, and names that nobody reads."""
    drawn = {key.encode(): rng.integers(0, classes, count).tolist() for key, classes in labels.items()}
    return {
        b"batch_label": b"a drawn batch",
        **drawn,
        b"data": rng.integers(0, 256, (count, 3072), np.uint8),
        b"filenames": [f"{i}.png".encode() for i in range(count)],
    }


@dataclass
class CifarFiles:
    batches: dict[str, dict[bytes, Any]]
    contents: dict[str, bytes]
    reader: Cifar

    def write(self, folder: Path, names: Any = None) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names or self.contents:
            (folder / name).write_bytes(self.contents[name])
        return folder

    def archive(self, path: Path, names: Any = None, *, compressed: bool = True) -> Path:
        """The batches in a tar file, of equal bytes each time."""
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w") as archive:
            folder = tarfile.TarInfo(self.reader.folder)
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            for name in names or self.contents:
                member = tarfile.TarInfo(f"{self.reader.folder}/{name}")
                member.size = len(self.contents[name])
                archive.addfile(member, io.BytesIO(self.contents[name]))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(file.getvalue(), 1, mtime=0) if compressed else file.getvalue())
        return path


def cifar_files(fine: bool = False, protocol: int = 2, seed: int = 0) -> CifarFiles:
    """Small CIFAR-10 batches, or with ``fine`` CIFAR-100's, and the reader that takes them for the official ones."""
    official = CIFAR100 if fine else CIFAR10
    rng = np.random.default_rng(seed)
    labels = {"fine_labels": 100, "coarse_labels": 20} if fine else {"labels": 10}
    names = [*official.train, *official.test]
    batches = {name: cifar_batch(rng, 11 + i, labels) for i, name in enumerate(names)}
    contents = {name: pickle.dumps(batch, protocol=protocol) for name, batch in batches.items()}
    sums = {name: md5_of(content) for name, content in contents.items()}
    reader = Cifar(
        **{
            **vars(official),
            "train": {name: sums[name] for name in official.train},
            "test": {name: sums[name] for name in official.test},
        }
    )
    return CifarFiles(batches, contents, reader)
