"""A folder of images of the user's own, one folder for each class: train/CLASS/IMAGE, and test/ or val/ alike.

That is the layout of torchvision's ``ImageFolder``, whose numbering of classes this is; torchvision is not needed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ....errors import UserError, require
from ..draws import ranks
from ..registry import DataSet, Images, Request, register
from ..source_files import Origin, require_folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
TESTS = ("test", "val")
_ORIGIN = Origin("images", "where its images come from")
# PIL's modes of grey images; all others are read as red, green and blue.
_GREY = ("1", "L")


def read(request: Request) -> tuple[Images, Images]:
    """The training and the test images, each in an order of its own that mixes the classes and is always the same.

    One channel if all images are grey, else three. The classes are the folders of train/ in the order of their names.
    """
    require_folder(_ORIGIN, request.root)
    train = request.root / "train"
    test = next((request.root / name for name in TESTS if (request.root / name).is_dir()), request.root / TESTS[0])
    classes = sorted(path.name for path in _content(train) if path.is_dir())
    for path in _content(test):
        if path.is_dir() and path.name not in classes:
            raise UserError(f"data set images: {path} is no class of {train}, which has {', '.join(classes) or 'none'}")
    parts = [_files(part, classes) for part in (train, test)]
    if empty := set(range(len(classes))) - {label for _, label in parts[0]}:
        raise UserError(
            f"data set images: {train / classes[min(empty)]} holds no image; add some, or remove the folder"
        )
    if len(classes) < 2:
        raise UserError(f"data set images: {train} has one class, {classes[0]}; two are needed")
    opened = [[_opened(path) for path, _ in part] for part in parts]
    grey = all(is_grey for part in opened for _, is_grey in part)
    first = parts[0][0][0]
    shape = opened[0][0][0].shape[:2]
    for part, images in zip(parts, opened):
        for (path, _), (pixels, _) in zip(part, images):
            if pixels.shape[:2] != shape:
                raise UserError(
                    f"data set images: {path} is of {_size(pixels.shape)} pixels, {first} of {_size(shape)}; "
                    "bring all images to one size"
                )
    train_images, test_images = (_stacked(part, images, grey) for part, images in zip(parts, opened))
    return train_images, test_images


def _content(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(
            f"data set images: there is no folder {folder}; the images of a class belong into {folder / 'CLASS'}"
        )
    return sorted(folder.iterdir())


def _files(part: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The images of train/ or test/ with their labels, mixed."""
    found = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((part / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
    ]
    if not found:
        raise UserError(
            f"data set images: {part} holds no image; those of a class belong into {part / 'CLASS'} "
            f"({', '.join(SUFFIXES)})"
        )
    return [found[i] for i in np.argsort(ranks(0, "images", len(found)), kind="stable")]


def _opened(path: Path) -> tuple[np.ndarray, bool]:
    """(H, W) or (H, W, 3), uint8, and whether the image is grey."""
    image_module = require("PIL.Image", "pillow")
    try:
        with image_module.open(path) as image:
            grey = image.mode in _GREY
            return np.array(image.convert("L" if grey else "RGB")), grey
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise UserError(f"data set images: {path} cannot be read as an image ({error}); replace or remove it") from None


def _stacked(part: list[tuple[Path, int]], images: list[tuple[np.ndarray, bool]], grey: bool) -> Images:
    channels = [_channels(pixels, grey) for pixels, _ in images]
    return Images(np.stack(channels), np.array([label for _, label in part], np.int64))


def _channels(pixels: np.ndarray, grey: bool) -> np.ndarray:
    """(1 or 3, H, W); a grey image among coloured ones has three equal channels."""
    if grey:
        return pixels[None]
    return np.broadcast_to(pixels, (3, *pixels.shape)) if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"


register(DataSet("images", read, num_classes=None, validation=0))
