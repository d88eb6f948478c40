"""On a GPU, these tests have the host wait for what the device finds, as it does after every change that it sees.

Then a replaced weight starts anew at once, as on the CPU. What the host does not wait for is tested in
tests/kernels/test_fingerprint.py.
"""

from __future__ import annotations

import pytest

from sn_fast.normalization.state import State

from ..on_device import DEVICE


@pytest.fixture(autouse=True)
def _host_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type != "cpu":
        monkeypatch.setattr(State, "is_suspect", lambda *_: True)
