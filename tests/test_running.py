"""Progress bars: widgets in notebooks, redrawn in terminals, sparse lines in logs."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from sn_fast import running
from sn_fast.running import progress_bar

tqdm = pytest.importorskip("tqdm")


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def shown(monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    """What a job of 400 steps writes to stderr."""
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(True, "training", 400) as bar:
        for epoch in (1, 2):
            bar.set_description_str(f"epoch {epoch}/2", refresh=False)
            for _ in range(200):
                bar.set_postfix_str("loss 1.0", refresh=False)
                bar.update(1)
    return stream.getvalue()


def test_a_log_has_lines_and_few(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=False)
    assert "\r" not in text
    first, *_, last = lines = text.splitlines()
    assert first.startswith("training:   0%|")
    assert last.startswith("epoch 2/2: 100%|")
    assert last.endswith(", loss 1.0]")
    assert text.endswith("\n")
    assert len(lines) <= 3


def test_a_log_of_a_long_job_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_SECONDS_BETWEEN_LINES", 0.0)
    lines = shown(monkeypatch, terminal=False).splitlines()
    assert len(lines) > 10
    assert all(line.startswith(("training:", "epoch ")) for line in lines)
    assert len(set(lines)) == len(lines)


def test_a_terminal_is_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True)
    assert text.count("\n") == 1
    assert text.count("\r") >= 2
    assert "epoch 2/2: 100%|" in text


def test_a_notebook_has_a_widget(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class tqdm_notebook:  # the real one needs packages of notebooks
        def __init__(self, **options: Any) -> None:
            given.update(options)

    auto = pytest.importorskip("tqdm.auto")
    monkeypatch.setattr(auto, "tqdm", type("tqdm", (tqdm_notebook,), {}))
    monkeypatch.setattr(sys, "stderr", Stream(terminal=False))
    progress_bar(True, "training", 400, 3)
    assert given["file"] is sys.stderr  # of any other stream tqdm makes text
    assert given["mininterval"] < 1
    assert (given["desc"], given["total"], given["initial"]) == ("training", 400, 3)


def test_without_progress_nothing_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Stream(terminal=False))
    with progress_bar(False, "training", 400) as bar:
        bar.update(1)
        bar.set_postfix_str("x", refresh=True)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
