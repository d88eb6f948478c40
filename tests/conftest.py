"""Shared by all tests: the published outputs, a fixed seed, and packages that are not there."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

from . import on_device

on_device.activate()
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; some tests interrupt themselves
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # the tensors are small, and several processes may share the cores

hypothesis.settings.register_profile("sn_fast", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("sn_fast")

REFERENCE = Path(os.environ.get("SN_FAST_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def published():
    """Loader of one file of the published code's outputs; skips where they are absent (they are not distributed)."""

    def load(name: str) -> dict[str, np.ndarray]:
        path = REFERENCE / name
        if not path.exists():
            pytest.skip(f"published outputs not found: {path} (set SN_FAST_REFERENCE to their folder)")
        with np.load(path) as data:
            return dict(data)

    return load


@pytest.fixture
def uninstalled(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a package look as if it were not installed."""

    def hide(package: str) -> None:
        class Finder:
            @staticmethod
            def find_spec(name: str, *args: object) -> None:
                if name == package:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        for module in [m for m in sys.modules if m.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])

    return hide
