"""The kernels, compiled for the CPU, in the place that they have on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from sn_fast.ops.library import UseKernels

from . import on_cpu

THREAD_ORDERS = (0, 1, 2, 3)  # 0: as numbered


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The compiled module."""
    return on_cpu.build()


@pytest.fixture
def kernels(module: ModuleType) -> Iterator[ModuleType]:
    """The compiled module, serving the operators on CPU tensors."""
    served = UseKernels(module, "cpu")
    try:
        yield module
    finally:
        module.set_thread_order(0)
        served.stop()


@pytest.fixture(params=THREAD_ORDERS, ids=lambda seed: f"order{seed}")
def ordered_kernels(kernels: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    """``kernels`` once for every order in which threads and blocks run."""
    kernels.set_thread_order(request.param)
    return kernels
