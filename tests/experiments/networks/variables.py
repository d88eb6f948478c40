"""Variables of the published networks: drawn from their names, as for the published logits, and read from files."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest

from tests.conftest import REFERENCE

PARTS = ("weights", "bias", "u", "gamma", "beta", "moving_mean", "moving_variance")


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of the variable of this name in the published logits."""
    z = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).randn(*shape)
    part = name.rpartition("/")[2]
    if part == "weights":
        z = z * np.sqrt(2 / np.prod(shape[:-1]))
    elif part == "moving_variance":
        z = np.exp(0.2 * z)
    elif part == "gamma":
        z = 1 + 0.1 * z
    elif part != "u":
        z = (0.1 if part in ("moving_mean", "beta") else 0.05) * z
    return z.astype(np.float32)


def drawn_all(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: drawn(name, shape) for name, shape in shapes.items()}


def of_file(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The variables among the arrays of a file."""
    return {name: a for name, a in arrays.items() if "." in name and name.rpartition(".")[2] in PARTS}


def description(name: str) -> dict:
    """One of the JSON files beside the published outputs; skips where they are absent."""
    path = REFERENCE / name
    if not path.exists():
        pytest.skip(f"published outputs not found: {path} (set SN_FAST_REFERENCE to their folder)")
    return json.loads(path.read_text())
