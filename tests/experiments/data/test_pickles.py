"""Pickles are read for their arrays, and run nothing."""

from __future__ import annotations

import builtins
import copyreg
import os
import pickle
import struct
import subprocess
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sn_fast.experiments.data.pickles import load_arrays

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Runs:
    """Unpickles as a call of ``function``."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "<f4", "f8", "?"])
def test_arrays_of_every_protocol(protocol, dtype):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2, (5, 3, 2)).astype(dtype)
    batch = {
        b"data": array,
        "text": np.asfortranarray(array),
        b"part": array[::2, 1],
        b"labels": [1, 2, int(1e12)],
        b"number": array[0, 0, 0],
        b"empty": array[:0],
        b"bytes": b"\x00\xff",
    }
    found = load_arrays(pickle.dumps(batch, protocol))
    assert found.keys() == batch.keys()
    for key, value in batch.items():
        np.testing.assert_array_equal(found[key], value)
        if isinstance(value, np.ndarray):
            assert found[key].dtype == value.dtype


def test_python_2s_own_bytes():
    """As cPickle of Python 2 wrote the official batches: protocol 2, with texts of bytes (SHORT_BINSTRING)."""
    state = (1, (2, 3), "dtype", False, bytes(range(6)))
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(K\x02K\x03tcnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x06" + state[4] + b"tbU\x06labels](K\x07K\x08eu."
    )
    found = load_arrays(content)
    np.testing.assert_array_equal(found[b"data"], np.arange(6, dtype=np.uint8).reshape(2, 3))
    assert found[b"labels"] == [7, 8]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "call",
    [
        lambda mark: Runs(os.system, f"touch {mark}"),
        lambda mark: Runs(builtins.eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Runs(builtins.exec, f"open({str(mark)!r}, 'w')"),
        lambda mark: Runs(open, str(mark), "w"),
        lambda mark: Runs(subprocess.call, ["touch", str(mark)]),
        lambda mark: Runs(Path, str(mark)),
        lambda mark: Runs(getattr, np.ndarray, "tofile"),
        lambda mark: Runs(np.save, str(mark), 1),
        lambda mark: Runs(np.fromfile, str(mark)),
        lambda mark: Fraction(1, 2),
        lambda mark: np.array([Runs(os.system, f"touch {mark}")], dtype=object),
        lambda mark: [{b"data": Runs(os.system, f"touch {mark}")}],
    ],
)
def test_nothing_is_called(tmp_path, protocol, call):
    mark = tmp_path / "mark"
    with pytest.raises(pickle.UnpicklingError) as caught:
        load_arrays(pickle.dumps({b"data": call(mark)}, protocol))
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Runs(os.system, f"touch {mark}"), protocol))
    assert mark.exists()  # it would have


def dump(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


DTYPE = name("numpy", "dtype") + b"(X\x02\x00\x00\x00u1tR"
ARRAY = name("numpy.core.multiarray", "_reconstruct") + b"(tR"


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "no pickle": b"\x1f\x8b\x08\x00 something else",
        "no end": b"\x80\x02]",
        "protocol of the future": b"\x80\x63].",
        "the oldest call": dump(b"(X\x02\x00\x00\x00lsios\nsystem\n"),
        "a class by its instance": dump(b"(cos\nsystem\nX\x02\x00\x00\x00lso"),
        "a registered extension": dump(b"\x82\xf0"),
        "a persistent id": dump(b"Pxyz\n"),
        "a name within a name": dump(b"\x8c\x05numpy\x8c\x10ndarray.__init__\x93"),
        "a call of no function": dump(name("numpy", "ndarray"), b"(K\x03tR"),
        "a large place in the memo": dump(b"]r" + struct.pack("<I", 2**32 - 1), b"j" + struct.pack("<I", 5)),
        "more bytes than are there": dump(b"\x8e" + struct.pack("<Q", 2**62) + b"abc"),
        "an array of objects": dump(name("numpy", "dtype"), b"(X\x02\x00\x00\x00O8tR"),
        "an array of records": dump(name("numpy", "dtype"), b"(X\x05\x00\x00\x00u1,u1tR"),
        "a type that is none": dump(name("numpy", "dtype"), b"(]tR"),
        "too few bytes": dump(ARRAY, b"(K\x01(K\x02K\x03t", DTYPE, b"\x89C\x05abcdetb"),
        "a size that is none": dump(ARRAY, b"(K\x01(J\xff\xff\xff\xffJ\xff\xff\xff\xfft", DTYPE, b"\x89C\x01atb"),
        "sizes within sizes": dump(ARRAY, b"(K\x01(K\x01(K\x01tt", DTYPE, b"\x89C\x01atb"),
        "no bytes": dump(ARRAY, b"(K\x01(K\x02t", DTYPE, b"\x89]tb"),
        "another encoding": dump(name("_codecs", "encode"), b"(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR"),
        "a text as bytes": dump(name("_codecs", "encode"), b"(C\x01aX\x06\x00\x00\x00latin1tR"),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_is_no_array_is_refused(content):
    copyreg.add_extension("os", "system", 0xF0)
    try:
        with pytest.raises(pickle.UnpicklingError) as caught:
            load_arrays(content[1])
    finally:
        copyreg.remove_extension("os", "system", 0xF0)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_place_in_the_memo_takes_no_memory():
    tracemalloc.start()
    try:
        load_arrays(dump(b"]r" + struct.pack("<I", 2**26)))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_a_pickle_that_changes_a_function_changes_no_other_pickle():
    function = name("_codecs", "encode")
    load_arrays(dump(function, b"N}X\x0e\x00\x00\x00__kwdefaults__}X\x01\x00\x00\x00aK\x01ss\x86b"))
    array = np.arange(4)
    np.testing.assert_array_equal(load_arrays(pickle.dumps(array, 2)), array)


@given(data=st.data())
@settings(max_examples=200)
def test_damage_ends_in_one_kind_of_error(data):
    content = bytearray(pickle.dumps({b"data": np.arange(6, dtype="u1").reshape(2, 3), b"labels": [1, 2]}, 2))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        load_arrays(bytes(content))
    except pickle.UnpicklingError:
        with pytest.raises(pickle.UnpicklingError, match=r"^.{1,400}$"):
            load_arrays(bytes(content))
