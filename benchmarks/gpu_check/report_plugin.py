"""A pytest plugin: one line of JSON per test, as it ends, to the file that SN_FAST_TEST_REPORT names."""

from __future__ import annotations

import json
import os

import pytest


class _Reporter:
    def __init__(self, path: str) -> None:
        self._file = open(path, "a", buffering=1)  # noqa: SIM115 - open to the end of the session

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test's three phases: the call, and a setup or teardown that did not pass."""
        if report.when != "call" and report.passed:
            return
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else str(report.longrepr or "")
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        line = {"test": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 2)}
        self._file.write(
            json.dumps(line | ({"message": message[:400]} if outcome in ("failed", "error") else {})) + "\n"
        )

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that does not import."""
        if report.failed:
            line = {"test": report.nodeid, "outcome": "error", "seconds": 0.0, "message": str(report.longrepr)[-400:]}
            self._file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    """In the controlling process alone: it hears of every worker's tests."""
    path = os.environ.get("SN_FAST_TEST_REPORT")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Reporter(path))
