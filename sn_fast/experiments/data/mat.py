"""Arrays of numbers in MATLAB files of version 5, the format of SVHN.

SciPy's reader is written in C for all of MATLAB's types, and a damaged file ends the process there (a segmentation
fault, seen with SciPy 1.17); this one ends in an exception.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator

import numpy as np

_HEADER = 128
_MATRIX, _COMPRESSED = 14, 15
# Types of stored numbers. MATLAB stores doubles that are small whole numbers as bytes.
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_NUMERIC_CLASSES = range(6, 16)
_COMPLEX = 0x0800


class MatError(Exception):
    """The file is damaged, or no MATLAB file of version 5."""


def load_mat(content: bytes, most: int) -> dict[str, np.ndarray]:
    """The real numeric arrays of a file by name, in their shape, of the type that they are stored in.

    Args:
        content: the file.
        most: the largest number of bytes of one array, which bounds what is unpacked.

    Raises:
        MatError: the file is damaged, or of another format.
    """
    order = {b"IM": "<", b"MI": ">"}.get(content[_HEADER - 2 : _HEADER])
    if order is None or struct.unpack_from(order + "H", content, _HEADER - 4) != (0x0100,):
        raise MatError("it is no MATLAB file of version 5")
    arrays = {}
    for kind, data in _elements(content, _HEADER, order):
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            try:
                unpacked = unpacker.decompress(data, most + 1024)  # and the array's description
            except zlib.error:
                raise MatError("its compressed data are damaged") from None
            if not unpacker.eof:
                raise MatError(f"its compressed data are cut, or longer than {most} bytes")
            kind, data = next(_elements(unpacked, 0, order), (0, data))
        if kind == _MATRIX and (named := _matrix(data, order)):
            arrays[named[0]] = named[1]
    return arrays


def _elements(content: bytes | memoryview, start: int, order: str) -> Iterator[tuple[int, memoryview]]:
    """Type and data of each element."""
    view = memoryview(content)
    while start < len(view):
        if start + 8 > len(view):
            raise MatError("it is cut")
        kind, size = struct.unpack_from(order + "2I", view, start)
        if kind >> 16:  # up to four bytes stand in the tag itself
            kind, size, start, end = kind & 0xFFFF, kind >> 16, start + 4, start + 8
            if size > 4:
                raise MatError("an element of it is damaged")
        else:
            start += 8
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(view):
            raise MatError("it is cut")
        yield kind, view[start : start + size]
        start = end


def _matrix(data: memoryview, order: str) -> tuple[str, np.ndarray] | None:
    """Name and array of a matrix; None for those that are no real numbers."""
    parts = list(_elements(data, 0, order))
    if len(parts) < 4 or len(parts[0][1]) != 8 or len(parts[1][1]) % 4:
        return None
    (flags,) = struct.unpack_from(order + "I", parts[0][1])
    kind, numbers = parts[3]
    if flags & 0xFF not in _NUMERIC_CLASSES or flags & _COMPLEX or kind not in _NUMBERS:
        return None
    shape = struct.unpack(f"{order}{len(parts[1][1]) // 4}i", parts[1][1])
    dtype = np.dtype(order + _NUMBERS[kind])
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(numbers):
        raise MatError(f"its array of shape {shape} has {len(numbers)} bytes")
    return bytes(parts[2][1]).decode("ascii", "replace"), np.frombuffer(numbers, dtype).reshape(shape, order="F")
