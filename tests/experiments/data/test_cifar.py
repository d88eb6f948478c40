"""CIFAR's batches: in a folder, in an archive, whole or in part, and damaged."""

from __future__ import annotations

import io
import os
import pickle
import re
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn_fast.errors import UserError
from sn_fast.experiments.data.source_files import md5_of

from .written import CifarFiles, cifar_files, request


def assert_read(files: CifarFiles, parts, key: bytes = b"labels", names=None) -> None:
    for images, official in zip(parts, (files.reader.train, files.reader.test)):
        batches = [files.batches[name] for name in official if names is None or name in names]
        pixels = np.concatenate([batch[b"data"] for batch in batches])
        np.testing.assert_array_equal(images.pixels, pixels.reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(images.labels, np.concatenate([batch[key] for batch in batches]))
        assert (images.pixels.dtype, images.labels.dtype) == (np.uint8, np.int64)


def refused(files: CifarFiles, root, pattern: str, **options) -> str:
    with pytest.raises(UserError, match=pattern) as caught:
        files.reader.read(request(root, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_channels_come_first_and_rows_before_columns(tmp_path):
    files = cifar_files()
    train, _ = files.reader.read(request(files.write(tmp_path)))
    flat = files.batches["data_batch_1"][b"data"][4]
    assert train.pixels[4, 1, 2, 3] == flat[1024 + 2 * 32 + 3]  # green, row 2, column 3: the format's description


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", [".", "cifar-10-batches-py"])
def test_folders(tmp_path, protocol, place):
    files = cifar_files(protocol=protocol)
    files.write(tmp_path / place)
    assert_read(files, files.reader.read(request(tmp_path)))


@pytest.mark.parametrize("compressed", [False, True])
def test_an_archive_is_read_in_place(tmp_path, compressed):
    files = cifar_files()
    alone = files.archive(tmp_path / "cifar-10-python.tar.gz", compressed=compressed)
    assert_read(files, files.reader.read(request(alone)))
    assert_read(files, files.reader.read(request(alone.parent)))
    assert os.listdir(alone.parent) == [alone.name]
    renamed = alone.rename(alone.with_name("cifar-10-mine.tar.gz"))
    assert_read(files, files.reader.read(request(renamed.parent)))
    renamed.with_name("cifar-10-other.tar.gz").touch()
    refused(files, renamed.parent, "holds cifar-10-mine.tar.gz, cifar-10-other.tar.gz; give the one to read")


@pytest.mark.parametrize(("coarse", "key"), [(False, b"fine_labels"), (True, b"coarse_labels")])
def test_cifar100_has_fine_and_coarse_labels(tmp_path, coarse, key):
    files = cifar_files(fine=True)
    files.write(tmp_path / "cifar-100-python")
    assert_read(files, files.reader.read(request(tmp_path, coarse=coarse)), key)


@pytest.mark.parametrize("archive", [False, True])
def test_absent_batches_are_named_or_done_without(tmp_path, archive):
    files = cifar_files()
    there = ["data_batch_1", "data_batch_4", "test_batch"]
    root = files.archive(tmp_path / "a.tar.gz", there) if archive else files.write(tmp_path / "a", there)
    message = refused(files, root, "lacks data_batch_2, data_batch_3, data_batch_5; add the official files")
    assert "`allow_partial`" in message
    assert "kriz/cifar" in message
    assert_read(files, files.reader.read(request(root, allow_partial=True)), names=there)


@pytest.mark.parametrize(
    ("there", "pattern"),
    [
        (["test_batch"], "data_batch_1 or data_batch_2 .* not found; put the official files into"),
        (["data_batch_3"], "test_batch not found; put the official files into"),
    ],
)
def test_a_part_that_is_absent_whole(tmp_path, there, pattern):
    files = cifar_files()
    refused(files, files.write(tmp_path, there), pattern, allow_partial=True)


def test_an_empty_folder(tmp_path):
    message = refused(cifar_files(), tmp_path, "cifar-10-batches-py/data_batch_1 or cifar-10-python.tar.gz not found")
    assert str(tmp_path) in message


def test_swapped_batches_are_found(tmp_path):
    files = cifar_files()
    files.contents["data_batch_2"], files.contents["test_batch"] = (
        files.contents["test_batch"],
        files.contents["data_batch_2"],
    )
    refused(files, files.write(tmp_path), "data_batch_2 is the official test_batch under a wrong name")


class Bad:
    def __reduce__(self):
        return os.system, ("touch harmed",)


DAMAGES = {
    "no dict": (lambda batch: [1, 2], "it lacks data"),
    "no data": (lambda batch: {b"labels": [1]}, "it lacks data"),
    "no labels": (lambda batch: {b"data": batch[b"data"]}, "it lacks labels"),
    "other type": (lambda batch: {**batch, b"data": batch[b"data"].astype(float)}, "data are not bytes of shape"),
    "other width": (lambda batch: {**batch, b"data": batch[b"data"][:, :-1]}, r"not bytes of shape \(N, 3072\)"),
    "flat": (lambda batch: {**batch, b"data": batch[b"data"].reshape(-1)}, r"not bytes of shape \(N, 3072\)"),
    "list": (lambda batch: {**batch, b"data": [1, 2]}, "data are not bytes"),
    "fewer labels": (lambda batch: {**batch, b"labels": batch[b"labels"][1:]}, "has 11 labels of 12 images"),
    "label 10": (
        lambda batch: {**batch, b"labels": [10, *batch[b"labels"][1:]]},
        "the label 10; labels are 0 to 9",
    ),
    "label -1": (lambda batch: {**batch, b"labels": [-1, *batch[b"labels"][1:]]}, "holds the label -1"),
    "half labels": (lambda batch: {**batch, b"labels": [0.5] * 12}, "labels are not whole numbers"),
    "large labels": (lambda batch: {**batch, b"labels": [2**70] * 12}, "labels are not whole numbers"),
    "texts": (lambda batch: {**batch, b"labels": b"012345678901"}, "labels are not whole numbers"),
    "lists": (lambda batch: {**batch, b"labels": [[1]] * 12}, "labels are not whole numbers"),
    "code": (lambda batch: {**batch, b"data": Bad()}, "(posix|nt).system is not allowed in it"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_batches(tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    files = cifar_files()
    change, pattern = DAMAGES[damage]
    files.contents["data_batch_2"] = pickle.dumps(change(files.batches["data_batch_2"]), 2)
    root = files.write(tmp_path / "a")
    refused(files, root, f"data_batch_2 .*{pattern}", allow_partial=True)
    refused(files, root, "data_batch_2 is not the official file: its MD5 sum is .*`allow_partial`")
    assert not (tmp_path / "harmed").exists()


def test_rebuilt_batches_may_have_text_keys_and_arrays_of_labels(tmp_path):
    files = cifar_files()
    for name, batch in files.batches.items():
        rebuilt = {"data": batch[b"data"], "labels": np.array(batch[b"labels"], np.int16)}
        files.contents[name] = pickle.dumps(rebuilt, 5)
    assert_read(files, files.reader.read(request(files.write(tmp_path), allow_partial=True)))


@given(data=st.data())
@settings(max_examples=40)
def test_a_cut_archive_is_refused(tmp_path_factory, data):
    files = cifar_files()
    compressed = data.draw(st.booleans())
    path = files.archive(tmp_path_factory.getbasetemp() / "cut" / "cifar-10-python.tar.gz", compressed=compressed)
    content = path.read_bytes()
    # What follows the last batch is padding: nothing is lost with it.
    last = files.contents["test_batch"]
    used = len(content) - 100 if compressed else content.index(last) + len(last)
    path.write_bytes(content[: data.draw(st.integers(0, used - 1))])
    refused(files, path, "cifar-10-python.tar.gz (is no tar archive, or is cut or damaged|lacks)")


@given(data=st.data())
@settings(max_examples=40)
def test_a_damaged_archive_is_refused_or_read_right(tmp_path_factory, data):
    files = cifar_files()
    path = files.archive(tmp_path_factory.getbasetemp() / "damaged" / "cifar-10-python.tar.gz")
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        parts = files.reader.read(request(path))
    except UserError:
        refused(files, path, "^data set cifar10: ")
    else:
        assert_read(files, parts)


def test_archives_with_other_things_under_a_batchs_name(tmp_path):
    files = cifar_files()
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name in ["data_batch_2", "test_batch"]:
            member = tarfile.TarInfo(f"../../a\nb/{name}")
            member.size = len(files.contents[name])
            archive.addfile(member, io.BytesIO(files.contents[name]))
    refused(files, path, "lacks data_batch_1, data_batch_3")
    parts = files.reader.read(request(path, allow_partial=True))
    assert_read(files, parts, names=["data_batch_2", "test_batch"])
    files.reader.test["test_batch"] = md5_of(b"")
    files.reader.train.clear()
    files.reader.train["data_batch_2"] = md5_of(files.contents["data_batch_2"])
    refused(files, path, re.escape(f"{path}: test_batch is not the official file"))


def test_an_archive_that_claims_to_be_endless(tmp_path):
    path = tmp_path / "cifar-10-python.tar.gz"
    member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    member.size = 2**40
    path.write_bytes(member.tobuf() + bytes(512))
    refused(cifar_files(), path, "data_batch_1 holds more than 400000000 bytes")


def test_a_folder_that_is_no_file(tmp_path):
    files = cifar_files()
    files.write(tmp_path)
    (tmp_path / "test_batch").unlink()
    (tmp_path / "test_batch").mkdir()
    refused(files, tmp_path, "lacks test_batch")
