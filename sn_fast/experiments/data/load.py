"""``load_data``: a data set by name, from a folder that the user names, prepared for an experiment."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ...errors import OptionError, UserError
from .draws import corrupted, draw
from .images import to_input
from .registry import DataSet, Images, Request, find_data_set
from .samples import Samples, Split

SPLITS = ("published", "all", "held_out")
PARTS = ("train", "test", "both")
_HELD_OUT = 5_000


def load_data(
    name: str,
    root: str | os.PathLike[str] | None = None,
    *,
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    split: str = "published",
    validation_size: int | None = None,
    whiten: bool = False,
    crop: int | None = None,
    random_labels: float = 0.0,
    random_part: str = "train",
    random_differ: bool = False,
    coarse: bool = False,
    allow_partial: bool = False,
    device: torch.device | str = "cpu",
) -> Split:
    """A data set, split into samples for training, validation and test.

    Equal arguments give equal bits. Every random choice has a stream of its own, of ``seed``.

    Args:
        name: one of ``data_set_names()``.
        root: the folder of the official files; see docs/data.md for what goes where. Embedded sets need none.
        train_size: so many training images, drawn by ``seed``; a larger size holds every smaller one. None: all, or
            200 of digits and 500 of mnist5k, which have no split of their own and are drawn in the proportions of the
            classes.
        test_size: so many test images, drawn by ``seed``, beside those for validation. None: all.
        classes: only images of these classes, which become the labels 0, 1, ... in this order.
        split: "published": validation has the first 500 test images, test the others, and of MNIST the first 5,000
            training images are not trained on. "all": the same, but trained on all training images. "held_out":
            validation has the first 5,000 training images, test all test images, training the others.
        validation_size: so many first images of what ``split`` gives to validation, instead of 500 or 5,000. Embedded
            sets: so many first test images; none by default.
        whiten: each image less its mean, over its standard deviation; otherwise pixels are in [0, 1].
        crop: side of the centre crop, in pixels, after whitening.
        random_labels: share of the labels, in [0, 1], that become random classes.
        random_part: "train", "test" (validation too) or "both": whose labels become random.
        random_differ: draw among the other classes. As published, a random class may be the true one.
        coarse: the 20 coarse classes of cifar100.
        allow_partial: accept files that are not the official ones whole: rebuilt, reduced, or batches that are absent.
        device: of the samples.

    Raises:
        UserError: an argument is out of range, or a file is missing, damaged or not the official one.
    """
    data_set = find_data_set(name)
    _check_choice("split", split, SPLITS)
    _check_choice("random_part", random_part, PARTS)
    _check_count("seed", seed, 0)
    for option, value, least in (
        ("train_size", train_size, 1),
        ("test_size", test_size, 1),
        ("validation_size", validation_size, 0),
        ("crop", crop, 1),
    ):
        if value is not None:
            _check_count(option, value, least)
    _check_share(random_labels)
    if coarse and data_set.coarse_classes is None:
        raise OptionError("coarse", coarse, f"{name} has no coarse classes; cifar100 has")
    train, test = _read(data_set, Request(name, _root(data_set, root), allow_partial, coarse, train_size, seed))
    relabel = _relabelling(classes, _number_of_classes(data_set, coarse, train, test))
    num_classes = int(relabel.max()) + 1
    held_out = train if split == "held_out" else test
    train_index, validation_index, test_index = _positions(data_set, split, validation_size, len(train), len(test))
    train_index, test_index = (
        _of_classes(name, relabel, images, index) for images, index in ((train, train_index), (test, test_index))
    )
    validation_index = validation_index[relabel[held_out.labels[validation_index]] >= 0]
    if not data_set.embedded:
        train_index = _draw(name, seed, "train_size", train_index, train_size)
    test_index = _draw(name, seed, "test_size", test_index, test_size)

    def samples(images: Images, index: np.ndarray, part: str) -> Samples:
        labels = relabel[images.labels[index]]
        if random_labels and random_part in (part, "both"):
            labels = corrupted(
                labels, index, random_labels, classes=num_classes, differ=random_differ, seed=seed, part=part
            )
        return Samples(to_input(images.pixels[index], whiten=whiten, crop=crop), torch.from_numpy(labels)).to(device)

    return Split(
        train=samples(train, train_index, "train"),
        validation=samples(held_out, validation_index, "test"),
        test=samples(test, test_index, "test"),
        num_classes=num_classes,
        name=name,
    )


def _root(data_set: DataSet, root: str | os.PathLike[str] | None) -> Path:
    if data_set.embedded:
        return Path()
    if root is None:
        raise UserError(
            f"argument `root`: is required for {data_set.name}: give the folder of its files; see docs/data.md"
        )
    path = Path(root).expanduser()
    if not path.exists():
        raise OptionError("root", str(root), f"is not there; give the folder of the official files of {data_set.name}")
    return path


def _read(data_set: DataSet, request: Request) -> tuple[Images, Images]:
    try:
        train, test = data_set.read(request)
    except OSError as error:
        raise OptionError("root", str(request.root), f"it cannot be read ({error.strerror or error})") from None
    if not (len(train) and len(test)):
        raise UserError(
            f"data set {request.name}: {request.root} holds {len(train)} training and {len(test)} test images"
        )
    return train, test


def _positions(
    data_set: DataSet, split: str, validation_size: int | None, train: int, test: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The places of training, validation and test samples among ``train`` and ``test`` images in the official order.

    Raises:
        UserError: nothing is left to train on or to test.
    """
    first = _HELD_OUT if split == "held_out" else data_set.validation
    size = first if validation_size is None else validation_size
    reserved = {"published": data_set.reserved, "all": 0, "held_out": size}[split]
    if reserved >= train:
        remedy = "all, or a smaller validation_size" if split == "held_out" else "all"
        raise OptionError(
            "split",
            split,
            f"it leaves the first {reserved} training images out, and {data_set.name} has {train}; choose {remedy}",
        )
    if split == "held_out":
        return np.arange(reserved, train), np.arange(reserved), np.arange(test)
    if size >= test:
        raise OptionError("validation_size", size, f"must be less than the {test} test images of {data_set.name}")
    return np.arange(reserved, train), np.arange(size), np.arange(size, test)


def _of_classes(name: str, relabel: np.ndarray, images: Images, index: np.ndarray) -> np.ndarray:
    kept = index[relabel[images.labels[index]] >= 0]
    if not len(kept):
        raise UserError(f"argument `classes`: no training or no test image of {name} is of these classes; give others")
    return kept


def _number_of_classes(data_set: DataSet, coarse: bool, train: Images, test: Images) -> int:
    """As the set says, or as many as the training images have; no label is of another class."""
    number = (data_set.coarse_classes if coarse else None) or data_set.num_classes or int(train.labels.max()) + 1
    for labels in (train.labels, test.labels):
        if not 0 <= labels.min() <= labels.max() < number:
            raise UserError(
                f"data set {data_set.name}: its labels are {labels.min()} to {labels.max()}, those of {number} classes "
                f"are 0 to {number - 1}"
            )
    return number


def _relabelling(classes: Sequence[int] | None, num_classes: int) -> np.ndarray:
    """The new label of each class; -1: it is left out."""
    if classes is None:
        return np.arange(num_classes)
    try:
        kept = [operator.index(label) for label in classes]
    except TypeError:
        kept = []
    if len(set(kept)) != len(kept) or len(kept) < 2 or not all(0 <= label < num_classes for label in kept):
        raise OptionError("classes", classes, f"give two or more different classes from 0 to {num_classes - 1}")
    relabel = np.full(num_classes, -1)
    relabel[kept] = np.arange(len(kept))
    return relabel


def _draw(name: str, seed: int, option: str, among: np.ndarray, size: int | None) -> np.ndarray:
    if size is not None and size > len(among):
        raise OptionError(option, size, f"{name} has {len(among)} such images with these options; give at most that")
    return among if size is None else draw(seed, option, among, size)


def _check_choice(option: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise OptionError(option, value, f"choose {', '.join(choices[:-1])} or {choices[-1]}")


def _check_count(option: str, value: object, least: int) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise OptionError(option, value, f"must be an integer >= {least}")


def _check_share(value: object) -> None:
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise OptionError("random_labels", value, "must be a number from 0 to 1")
