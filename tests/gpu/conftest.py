"""What only a GPU can tell of the kernels: ``pytest -m gpu`` there. Without one every test here is skipped.

SN_FAST_GPU_TESTS=rehearsed runs them on the emulator, with few small cases: do the tests themselves still run?
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sn_fast
from sn_fast.ops.library import UseKernels, has_kernels

REHEARSED = os.environ.get("SN_FAST_GPU_TESTS") == "rehearsed"
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> Iterator[str]:
    """Of the tensors, with the kernels in their place."""
    if REHEARSED:
        if not (shutil.which("g++") and importlib.util.find_spec("pybind11")):
            pytest.skip("the emulator needs g++ and pybind11")
        from ..kernels import emulator

        served = UseKernels(emulator.build(), "cpu")
        yield "cpu"
        served.stop()
        return
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU: PyTorch sees no CUDA device")
    if not has_kernels(torch.device("cuda")):
        pytest.fail(f"there are no kernels to test: {sn_fast.info()['kernels']}")
    torch.backends.cudnn.allow_tf32 = False  # comparisons are exact in float32
    yield "cuda"
