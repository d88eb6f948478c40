"""MNIST's format: read exactly, and refused in one line where anything in it is damaged."""

from __future__ import annotations

import gzip
import re
import shutil
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn_fast.errors import UserError
from sn_fast.experiments.data.idx import IdxSet
from sn_fast.experiments.data.source_files import md5_of

from .written import COUNTS, IdxFiles, idx, idx_files, request

NAMES = [f"{part}-{kind}" for part in COUNTS for kind in ("images", "labels")]


@pytest.fixture
def files(tmp_path) -> IdxFiles:
    found = idx_files(tmp_path)
    found.write()
    return found


def refused(files: IdxFiles, pattern: str, **options) -> str:
    with pytest.raises(UserError, match=pattern) as caught:
        files.reader.read(request(files.folder, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_read(files: IdxFiles, parts) -> None:
    for part, images in zip(COUNTS, parts):
        np.testing.assert_array_equal(images.pixels[:, 0], files.arrays[f"{part}-images"])
        np.testing.assert_array_equal(images.labels, files.arrays[f"{part}-labels"])
        assert images.labels.dtype == np.int64


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("sign", ["-", "."])
@pytest.mark.parametrize("place", [".", "drawn", "Drawn/raw"])
def test_every_name_and_place_in_use(tmp_path, suffix, sign, place):
    files = idx_files(tmp_path / place)
    files.write(suffix)
    for name in NAMES:
        path = files.path(name, suffix)
        path.rename(path.with_name(path.name.replace("-idx", f"{sign}idx")))
    assert_read(files, files.reader.read(request(tmp_path)))


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_with_its_place_and_source(files, name):
    files.path(name).unlink()
    message = refused(files, f"data set drawn: {re.escape(files.path(name).name)} .* not found")
    assert str(files.folder) in message
    assert "nowhere.example" in message


def test_an_empty_folder_names_every_place(tmp_path):
    message = refused(idx_files(tmp_path), "train-images-idx3-ubyte .* not found")
    for place in (tmp_path, tmp_path / "drawn", tmp_path / "Drawn" / "raw"):
        assert str(place) in message


@pytest.mark.parametrize("allow_partial", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_byte_of_the_header_counts(files, name, allow_partial):
    content = files.content(name)
    for place in range(16 if name.endswith("images") else 8):
        for change in (1, 0x80):
            damaged = bytearray(content)
            damaged[place] ^= change
            files.path(name).write_bytes(damaged)
            refused(files, re.escape(str(files.path(name))), allow_partial=allow_partial)


@pytest.mark.parametrize("name", NAMES)
def test_every_byte_of_the_data_counts(files, name):
    content = bytearray(files.content(name))
    content[-3] = (content[-3] + 1) % 10
    files.path(name).write_bytes(content)
    message = refused(files, "is not the official file")
    assert "`allow_partial`" in message
    assert len(files.reader.read(request(files.folder, allow_partial=True))[0]) == COUNTS["train"]


@given(data=st.data())
@settings(max_examples=60)
def test_a_cut_or_lengthened_file_is_refused(tmp_path_factory, data):
    files = idx_files(tmp_path_factory.getbasetemp() / "cut")
    files.write()
    name = data.draw(st.sampled_from(NAMES))
    content = files.content(name)
    length = data.draw(st.integers(0, len(content) + 3).filter(lambda n: n != len(content)))
    files.path(name).write_bytes(content[:length].ljust(length, b"\1"))
    refused(files, re.escape(str(files.path(name))), allow_partial=data.draw(st.booleans()))


@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_gzip_file_is_refused_or_read_right(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "gzip"
    shutil.rmtree(folder, ignore_errors=True)
    files = idx_files(folder)
    files.write(".gz")
    path = files.path(data.draw(st.sampled_from(NAMES)), ".gz")
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
        path.write_bytes(content)
        refused(files, re.escape(str(path)))
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        try:
            parts = files.reader.read(request(folder))
        except UserError:
            refused(files, re.escape(str(path)))
        else:  # the byte was of the date, or the like
            assert_read(files, parts)


def test_a_bomb_is_not_unpacked_whole(files):
    path = files.path("train-images", ".gz")
    path.write_bytes(gzip.compress(bytes(50_000_000), 1))
    files.path("train-images").unlink()
    tracemalloc.start()
    try:
        refused(files, rf"holds more than the {16 + COUNTS['train'] * 784} bytes")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("one", "other", "pattern"),
    [
        ("train-images", "train-labels", "holds labels, not images"),
        ("train-labels", "train-images", "holds more than|holds images, not labels"),
        ("train-images", "t10k-images", "holds 23 images, not 37"),
        ("t10k-labels", "train-labels", "holds more than"),
    ],
)
def test_a_swapped_name_is_found(files, one, other, pattern):
    files.path(one).write_bytes(files.content(other))
    refused(files, pattern)


def test_files_of_one_size_that_changed_places_are_found(tmp_path):
    files = idx_files(tmp_path)
    equal = IdxFiles(tmp_path, files.arrays, IdxSet(files.reader.origin, (".",), {"train": 23, "t10k": 23}))
    train = np.random.default_rng(1).integers(0, 10, 23, np.uint8)
    equal.arrays["train-images"], equal.arrays["train-labels"] = files.arrays["t10k-images"][::-1], train
    equal.write()
    for name in NAMES:
        equal.reader.md5[name] = md5_of(equal.content(name))
    equal.path("t10k-labels").write_bytes(idx(train))
    refused(equal, "t10k-labels-idx1-ubyte is the official train-labels under a wrong name")


@pytest.mark.parametrize("label", [10, 255])
def test_a_label_out_of_range_is_refused(files, label):
    files.arrays["t10k-labels"][5] = label
    files.write()
    refused(files, f"t10k-labels-idx1-ubyte holds the label {label}; 9 is the largest", allow_partial=True)


def test_labels_of_other_images_are_refused(files):
    files.arrays["train-labels"] = files.arrays["train-labels"][:-1]
    files.write()
    refused(files, "has 36 labels of 37 images", allow_partial=True)
    refused(files, "holds 36 labels, not 37 .*`allow_partial`")


def test_other_image_sizes_are_refused(files):
    files.arrays["train-images"] = np.zeros((3, 14, 56))
    files.write()
    refused(files, "holds images of 14x56 pixels, not 28x28", allow_partial=True)


def test_files_of_another_set_with_equal_names_are_refused(files):
    fashion = IdxFiles(files.folder, files.arrays, IdxSet(files.reader.origin, (".",), dict(COUNTS)))
    fashion.reader.read(request(files.folder))
    other = IdxSet(files.reader.origin, (".",), dict(COUNTS), others=(files.reader,))
    refused(IdxFiles(files.folder, files.arrays, other), "train-images-idx3-ubyte is a file of drawn")


def test_sums_of_compressed_files_where_no_others_are_published(files):
    files.write(".gz")
    for name in NAMES:
        files.path(name).unlink()
    sums = {name: md5_of(files.path(name, ".gz").read_bytes()) for name in NAMES}
    reader = IdxSet(files.reader.origin, (".",), dict(COUNTS), gz_md5=sums)
    assert_read(files, reader.read(request(files.folder)))
    path = files.path("t10k-images", ".gz")
    path.write_bytes(gzip.compress(files.content("t10k-images"), 9))
    refused(IdxFiles(files.folder, files.arrays, reader), "t10k-images-idx3-ubyte.gz is not the official file")


def test_a_file_in_place_of_the_folder(files):
    with pytest.raises(UserError, match=r"root=.* is not a folder; give the one with the official files of drawn"):
        files.reader.read(request(files.path("train-images")))
