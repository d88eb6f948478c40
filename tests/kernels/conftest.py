"""The kernels, compiled for the CPU, in the place that they have on a GPU; or on one (SN_FAST_TEST_DEVICE=cuda)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from sn_fast.ops import compiled
from sn_fast.ops.library import UseKernels, has_kernels

from ..on_device import DEVICE
from . import emulator, tensor_cores

_MOST_UNDER_SANITIZERS = 4  # sets of parameters of one test
THREAD_ORDERS = (0, 1, 2, 3) if DEVICE.type == "cpu" else (0,)  # 0: as numbered; a GPU has its own


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under sanitizers, which are slow: a few of every test's sets of parameters, drawn."""
    if not emulator.sanitizers_loaded():
        return
    sets: dict[str, list[pytest.Item]] = {}
    for item in items:
        sets.setdefault(item.nodeid.partition("[")[0], []).append(item)
    few = [random.Random(0).sample(of_one, min(len(of_one), _MOST_UNDER_SANITIZERS)) for of_one in sets.values()]
    kept = {item for of_one in few for item in of_one}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


class _OnGpu:
    """The installed module; what only the CPU build has skips the test that asks for it."""

    def set_thread_order(self, seed: int) -> None:
        """A GPU's threads run in no order that one could set."""

    def __getattr__(self, name: str) -> Any:
        if not hasattr(compiled.MODULE, name):
            pytest.skip(f"{name} is in the CPU build alone")
        return getattr(compiled.MODULE, name)


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The compiled module."""
    if DEVICE.type == "cpu":
        return emulator.build()
    if compiled.MODULE is None:
        pytest.fail(f"no kernels to test: {compiled.STATUS}")
    return _OnGpu()  # type: ignore[return-value]


@pytest.fixture
def kernels(module: ModuleType) -> Iterator[ModuleType]:
    """The compiled module, serving the operators on tensors of the tests' device."""
    served = None if has_kernels(DEVICE) else UseKernels(module, DEVICE.type)
    try:
        yield module
    finally:
        module.set_thread_order(0)
        if served is not None:
            served.stop()


@pytest.fixture(params=tensor_cores.TENSOR_CORES if DEVICE.type == "cpu" else ["as it is"])
def rounding_kernels(kernels: ModuleType, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """``kernels`` once for every kind of tensor core that the emulation knows."""
    if DEVICE.type != "cpu":
        yield kernels
        return
    before = tensor_cores.tensor_core_of(kernels)
    tensor_cores.use(kernels, tensor_cores.TENSOR_CORES[request.param])
    yield kernels
    tensor_cores.use(kernels, before)


@pytest.fixture(params=THREAD_ORDERS, ids=lambda seed: f"order{seed}")
def ordered_kernels(kernels: ModuleType, request: pytest.FixtureRequest) -> ModuleType:
    """``kernels`` once for every order in which threads and blocks run."""
    kernels.set_thread_order(request.param)
    return kernels
