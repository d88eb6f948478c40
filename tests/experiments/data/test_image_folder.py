"""A folder of the user's own images, read as torchvision reads it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sn_fast.errors import UserError
from sn_fast.experiments import load_data
from sn_fast.experiments.data.sets import image_folder
from sn_fast.experiments.training import TrainConfig

from .written import request

image_module = pytest.importorskip("PIL.Image")

CLASSES = ("cat", "dog", "emu")
RNG = np.random.default_rng(0)


def write(path: Path, pixels: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.fromarray(pixels).save(path)
    return pixels


def coloured(size: tuple[int, int] = (8, 8)) -> np.ndarray:
    return RNG.integers(0, 256, (*size, 3), np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of each of three classes for training, five for the test, whose first pixel is of their class."""
    for part, count in (("train", 12), ("test", 5)):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                pixels = coloured()
                pixels[0, 0] = (10 * label, 20 * label, 30 * label)
                write(tmp_path / part / name / f"{i}.png", pixels)
    return tmp_path


def test_every_image_has_the_label_of_its_folder(folder: Path) -> None:
    split = load_data("images", folder)
    assert (split.num_classes, len(split.train), len(split.test), len(split.validation)) == (3, 36, 15, 0)
    for samples in (split.train, split.test):
        first = samples.x[:, :, 0, 0] * 255
        assert (first == samples.y[:, None] * torch.tensor([10.0, 20.0, 30.0])).all()
    # The classes are mixed: a front part, such as validation has, is not of one class.
    assert set(load_data("images", folder, validation_size=9).validation.y.tolist()) == {0, 1, 2}
    stored = np.asarray(image_module.open(folder / "train" / "emu" / "3.png")).transpose(2, 0, 1) / np.float32(255)
    assert sum(bool((x == stored).all()) for x in split.train.x.numpy()) == 1


def test_as_torchvision_reads_it(folder: Path) -> None:
    torchvision = pytest.importorskip("torchvision")
    for part, samples in (("train", load_data("images", folder).train), ("test", load_data("images", folder).test)):
        theirs = torchvision.datasets.ImageFolder(folder / part, torchvision.transforms.ToTensor())
        expected = sorted((label, x.numpy().tobytes()) for x, label in theirs)
        assert sorted((int(y), x.numpy().tobytes()) for x, y in zip(samples.x, samples.y)) == expected


def test_grey_images_have_one_channel_unless_others_have_colours(folder: Path, tmp_path_factory) -> None:
    grey = tmp_path_factory.mktemp("grey")
    for part in ("train", "val"):
        for name in CLASSES:
            write(grey / part / name / "deeper" / "a.PGM", RNG.integers(0, 256, (6, 6), np.uint8))
    assert load_data("images", grey).image_shape == (1, 6, 6)
    pixels = write(folder / "train" / "cat" / "grey.png", RNG.integers(0, 256, (8, 8), np.uint8))
    split = load_data("images", folder)
    assert split.image_shape == (3, 8, 8)
    assert any((x * 255 == pixels).all() for x in split.train.x.numpy())


def test_a_class_that_the_test_lacks_moves_no_label(folder: Path) -> None:
    for path in (folder / "test" / "cat").iterdir():
        path.unlink()
    (folder / "test" / "cat").rmdir()
    test = load_data("images", folder).test
    assert set(test.y.tolist()) == {1, 2}
    assert (test.x[:, 0, 0, 0] * 255 == 10 * test.y).all()


def test_training_has_the_defaults_of_mnist(folder: Path) -> None:
    config = TrainConfig.create(data="images", data_dir=folder)
    assert (config.arch, config.optimizer, config.attack_labels) == ("mlp1_relu_sn", "adam", "predicted")
    split = load_data(config.data, **config.data_options())
    assert config.with_strength(split.mean_norm).eps == pytest.approx(0.05 * split.mean_norm)


def refused(folder: Path, pattern: str) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        image_folder.read(request(folder))
    assert "\n" not in str(caught.value)


def test_what_is_wrong_is_named(folder: Path, tmp_path_factory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    refused(empty, re.escape(f"there is no folder {empty / 'train'}; the images of a class belong into"))
    (empty / "train" / "cat").mkdir(parents=True)
    refused(empty, re.escape(f"there is no folder {empty / 'test'}"))
    (empty / "test").mkdir()
    refused(empty, re.escape(f"{empty / 'train'} holds no image"))
    write(empty / "train" / "cat" / "a.png", coloured())
    write(empty / "test" / "cat" / "a.png", coloured())
    refused(empty, "has one class, cat; two are needed")

    (folder / "train" / "ant").mkdir()
    refused(folder, re.escape(f"{folder / 'train' / 'ant'} holds no image"))
    (folder / "train" / "ant").rmdir()
    (folder / "test" / "ant").mkdir()
    refused(folder, re.escape(f"{folder / 'test' / 'ant'} is no class of {folder / 'train'}, which has cat, dog, emu"))
    (folder / "test" / "ant").rmdir()

    other = folder / "train" / "dog" / "other.png"
    write(other, coloured((7, 9)))
    refused(folder, re.escape(str(other)) + r".* of 9x7 pixels|of 8x8 pixels, .*other.png of 9x7")
    other.write_bytes(b"no image")
    refused(folder, re.escape(str(other)) + " cannot be read as an image")
    other.write_bytes((folder / "train" / "dog" / "0.png").read_bytes()[:-60])
    refused(folder, re.escape(str(other)) + " cannot be read as an image")
