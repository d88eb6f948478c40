"""The rules on their own: without the last check, which would hide a wrong one."""

from __future__ import annotations

import pytest

from sn_fast.lipschitz import propagate


@pytest.fixture
def rules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagate, "refuted", lambda *_: "")
