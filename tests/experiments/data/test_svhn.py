"""SVHN's MATLAB files, written by SciPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from sn_fast.errors import UserError
from sn_fast.experiments.data.sets import svhn
from sn_fast.experiments.data.source_files import md5_of

from .written import request

NAMES = ("train_32x32.mat", "test_32x32.mat")


def arrays(count: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 11, (count, 1), np.uint8)
    labels[:2, 0] = 10, 1
    return {"X": rng.integers(0, 256, (32, 32, 3, count), np.uint8), "y": labels}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Files that are taken for the official ones, and what they hold."""
    found = {name: arrays(17 - 4 * i, i) for i, name in enumerate(NAMES)}
    for name, content in found.items():
        scipy.io.savemat(tmp_path / name, content)
        monkeypatch.setitem(svhn.MD5, name, md5_of((tmp_path / name).read_bytes()))
    return found


def refused(root, pattern: str, **options) -> None:
    with pytest.raises(UserError, match=pattern) as caught:
        svhn.read(request(root, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [".", "svhn", "SVHN"])
def test_files(tmp_path, written, place):
    (tmp_path / place).mkdir(exist_ok=True)
    for name in NAMES:
        (tmp_path / name).rename(tmp_path / place / name)
    for images, content in zip(svhn.read(request(tmp_path)), written.values()):
        for i, (label, pixels) in enumerate(zip(images.labels, images.pixels)):
            assert label == content["y"][i, 0] % 10
            np.testing.assert_array_equal(pixels, np.moveaxis(content["X"][..., i], 2, 0))
        assert images.labels[:2].tolist() == [0, 1]
        assert images.pixels.flags.c_contiguous


@pytest.mark.parametrize("name", NAMES)
def test_missing_files(tmp_path, written, name):
    (tmp_path / name).unlink()
    refused(tmp_path, f"data set svhn: {name} not found; put the official files into .*SVHN .*housenumbers")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"y": np.ones((5, 1), np.uint8)}, "has 5 labels of 13 images"),
        ({"y": np.full((13, 1), 11, np.uint8)}, "holds labels other than 1 to 10"),
        ({"y": np.zeros((13, 1), np.uint8)}, "holds labels other than 1 to 10"),
        ({"y": np.full((13, 1), 1.5)}, "holds labels other than 1 to 10"),
        ({"X": np.zeros((32, 32, 13), np.uint8)}, r"holds X of uint8 and shape \(32, 32, 13\)"),
        ({"X": np.zeros((28, 28, 3, 13), np.uint8)}, r"shape \(28, 28, 3, 13\), not bytes of \(32, 32, 3, N\)"),
        ({"X": np.zeros((32, 32, 3, 13))}, "holds X of float64"),
        ({"X": np.zeros((32, 32, 3, 0), np.uint8)}, "has 13 labels of 0 images"),
    ],
)
def test_other_contents(tmp_path, written, change, pattern):
    path = tmp_path / NAMES[1]
    scipy.io.savemat(path, {**written[NAMES[1]], **change})
    refused(tmp_path, re.escape(str(path)) + f" .*{pattern}", allow_partial=True)
    refused(tmp_path, f"{NAMES[1]} is not the official file: .*`allow_partial`")


def test_a_file_without_images(tmp_path, written):
    scipy.io.savemat(tmp_path / NAMES[0], {"Z": np.zeros(3)})
    refused(tmp_path, "holds no images X and labels y, but Z", allow_partial=True)


def test_swapped_files(tmp_path, written):
    (tmp_path / NAMES[0]).write_bytes((tmp_path / NAMES[1]).read_bytes())
    refused(tmp_path, f"{NAMES[0]} is the official {NAMES[1]} under a wrong name")


@given(data=st.data())
@settings(max_examples=40)
def test_damage_ends_in_one_line(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mat"
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(NAMES):
        scipy.io.savemat(folder / name, arrays(3, i))
    path = folder / data.draw(st.sampled_from(NAMES))
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, 400))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        svhn.read(request(folder, allow_partial=True))
    except UserError:
        refused(folder, re.escape(str(path)), allow_partial=True)
