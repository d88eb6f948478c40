"""Data sets in the format of MNIST: four idx files, plain or compressed by gzip."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .registry import Images, Request
from .source_files import REBUILT, Origin, check_sum, md5_of, read_file, require_folder

SIDE = 28
CLASSES = 10
# The format (yann.lecun.com/exdb/mnist): 00 00, 08 = unsigned byte, number of axes; then each axis' length, big-endian.
AXES = {"images": 3, "labels": 1}


@dataclass(frozen=True)
class IdxSet:
    """A set of four idx files; ``folders`` are where they may be within the user's folder, the usual one first."""

    origin: Origin
    folders: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=lambda: {"train": 60_000, "t10k": 10_000})
    md5: dict[str, str] = field(default_factory=dict)
    """Of the uncompressed files, by "train-images" and so on."""
    gz_md5: dict[str, str] = field(default_factory=dict)
    """Of the compressed files, of a set that publishes no others; its plain files are checked by size."""
    others: tuple[IdxSet, ...] = ()
    """Sets whose files have the same names and sizes."""

    def read(self, request: Request) -> tuple[Images, Images]:
        """The training and the test images."""
        require_folder(self.origin, request.root)
        train, test = (self._part(request, part) for part in self.counts)
        return train, test

    def _part(self, request: Request, part: str) -> Images:
        arrays = {}
        for kind in AXES:
            path = self._find(request.root, part, kind)
            content = read_file(self.origin, path, most=_size(kind, self.counts[part]))
            arrays[kind] = self._parse(path, content, kind)
            if not request.allow_partial:
                self._check_official(path, content, part, kind, len(arrays[kind]))
        images, labels = arrays["images"], arrays["labels"]
        if len(images) != len(labels):
            raise self.origin.damaged(path, f"has {len(labels)} labels of {len(images)} images")
        return Images(images[:, None], labels.astype(np.int64))

    def _find(self, root: Path, part: str, kind: str) -> Path:
        folders = [folder for folder in (root / name for name in self.folders) if _holds_idx(folder)]
        names = _names(part, kind)
        for folder in folders:
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        raise self.origin.missing(f"{names[0]} (or {names[1]})", folders[0] if folders else root, self._places(folders))

    def _places(self, folders: list[Path]) -> tuple[str, ...]:
        return (".",) if folders else self.folders

    def _parse(self, path: Path, content: bytes, kind: str) -> np.ndarray:
        """The array of an idx file of this kind, after the checks that need no sum."""
        axes = AXES[kind]
        if content[:3] != b"\0\0\x08" or len(content) < 4:
            raise self.origin.damaged(
                path, f"is no idx file of bytes (it begins with {content[:4].hex(' ') or 'nothing'})"
            )
        if content[3] != axes:
            other = next((k for k, n in AXES.items() if n == content[3]), f"{content[3]} axes")
            raise self.origin.damaged(path, f"holds {other}, not {kind}")
        start = 4 + 4 * axes
        if len(content) < start:
            raise self.origin.damaged(path, "is cut")
        shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
        if kind == "images" and shape[1:] != (SIDE, SIDE):
            raise self.origin.damaged(path, f"holds images of {shape[1]}x{shape[2]} pixels, not {SIDE}x{SIDE}")
        if len(content) != _size(kind, shape[0]):
            raise self.origin.damaged(
                path, f"is {len(content)} bytes long, but {shape[0]} {kind} take {_size(kind, shape[0])}"
            )
        array = np.frombuffer(content, np.uint8, offset=start).reshape(shape)
        if kind == "labels" and len(array) and array.max() >= CLASSES:
            raise self.origin.damaged(path, f"holds the label {array.max()}; {CLASSES - 1} is the largest")
        return array

    def _check_official(self, path: Path, content: bytes, part: str, kind: str, count: int) -> None:
        if count != self.counts[part]:
            raise self.origin.damaged(path, f"holds {count} {kind}, not {self.counts[part]} ({REBUILT})")
        name = f"{part}-{kind}"
        for other in self.others:
            if md5_of(content) in other.md5.values():
                raise self.origin.damaged(path, f"is a file of {other.origin.name}")
        if name in self.md5:
            check_sum(self.origin, path, content, self.md5[name], official=self.md5)
        elif name in self.gz_md5 and path.suffix == ".gz":
            check_sum(self.origin, path, path.read_bytes(), self.gz_md5[name], official=self.gz_md5)


def _size(kind: str, count: int) -> int:
    """Bytes of an idx file of ``count`` images or labels."""
    return 4 + 4 * AXES[kind] + count * (SIDE * SIDE if kind == "images" else 1)


def _names(part: str, kind: str) -> tuple[str, ...]:
    """The names in use: with a hyphen as published, or a dot as some unpackers make them."""
    plain = [f"{part}-{kind}{sign}idx{AXES[kind]}-ubyte" for sign in "-."]
    return (plain[0], f"{plain[0]}.gz", plain[1], f"{plain[1]}.gz")


def _holds_idx(folder: Path) -> bool:
    return folder.is_dir() and any(re.match(r"(train|t10k)-(images|labels)[-.]idx", p.name) for p in folder.iterdir())
