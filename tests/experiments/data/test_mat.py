"""MATLAB files of version 5, as SciPy writes them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import scipy.io

from sn_fast.experiments.data.mat import MatError, load_mat

MOST = 10_000


def saved(arrays: dict[str, object], compressed: bool) -> bytes:
    file = io.BytesIO()
    scipy.io.savemat(file, arrays, do_compression=compressed)
    return file.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_numbers_of_every_type(dtype, compressed):
    rng = np.random.default_rng(0)
    arrays = {
        "X": rng.integers(0, 100, (3, 4, 2, 5)).astype(dtype),
        "y": rng.integers(0, 100, (7, 1)).astype(dtype),
        "a_long_name": np.zeros((0, 3), dtype),
        "one": np.full((1, 1), 3, dtype),
    }
    others = {"text": "abc", "cell": np.array([1, "x"], dtype=object), "complex": np.ones((2, 2)) * 1j, "s": {"X": 1}}
    found = load_mat(saved({**others, **arrays}, compressed), MOST)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype


def big_endian(values: bytes, shape: tuple[int, int]) -> bytes:
    """By hand after the format's description: doubles stored as bytes, in a file of the other byte order."""
    parts = [
        struct.pack(">4I", 6, 8, 6, 0),  # array flags: class double
        struct.pack(">2I2i", 5, 8, *shape),
        struct.pack(">2H", 1, 1) + b"y\0\0\0",  # a small element: one byte of int8
        struct.pack(">2I", 2, len(values)) + values.ljust(-(-len(values) // 8) * 8, b"\0"),
    ]
    matrix = b"".join(parts)
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI" + struct.pack(">2I", 14, len(matrix)) + matrix


def test_the_other_byte_order_and_doubles_as_bytes():
    content = big_endian(bytes(range(6)), (2, 3))
    expected = scipy.io.loadmat(io.BytesIO(content))["y"]
    np.testing.assert_array_equal(load_mat(content, MOST)["y"], expected)
    np.testing.assert_array_equal(expected, np.arange(6).reshape(3, 2).T)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_cut_file_is_refused_or_lacks_an_array(compressed):
    arrays = {"X": np.arange(40, dtype=np.uint8), "y": np.arange(9.0)}
    content = saved(arrays, compressed)
    messages = set()
    for length in range(len(content) - 8):
        try:
            found = load_mat(content[:length], MOST)
        except MatError as error:
            messages.add(str(error))
            continue
        assert found.keys() < arrays.keys()
    assert messages == {"it is cut", "it is no MATLAB file of version 5"}


@pytest.mark.parametrize("compressed", [False, True])
def test_every_changed_byte_ends_in_an_array_or_one_kind_of_error(compressed):
    content = saved({"X": np.arange(40, dtype=np.uint8), "y": np.arange(9.0)}, compressed)
    ends = {"read": 0, "refused": 0}
    for place in range(100, len(content)):
        for change in (1, 8, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[place] ^= change
            try:
                load_mat(bytes(damaged), MOST)
                ends["read"] += 1
            except MatError:
                ends["refused"] += 1
    assert all(ends.values())


def test_a_bomb_is_not_unpacked_whole():
    data = zlib.compress(bytes(20_000_000))
    content = b"".ljust(124) + b"\x00\x01IM" + struct.pack("<2I", 15, len(data)) + data
    with pytest.raises(MatError, match="longer than 10000 bytes"):
        load_mat(content, MOST)


@pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n".ljust(200), bytes(500)])
def test_other_formats(content):
    with pytest.raises(MatError, match="no MATLAB file of version 5"):
        load_mat(content, MOST)
