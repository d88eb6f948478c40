"""What docs/experiments.md shows is what happens."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from sn_fast.cli import _parser

PAGE = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()


def test_the_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "docs/experiments.md", "exec"), {})
    assert "digits mlp1_elu FGM" in capsys.readouterr().out


def test_commands_have_the_options_that_the_page_gives_them() -> None:
    commands = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 5
    for command in commands:
        _parser().parse_args(shlex.split(command)[1:])
    options = set(re.findall(r"`(--[a-z-]+)", PAGE))
    helps = "".join(p.format_help() for p in _parser()._subparsers._group_actions[0].choices.values())
    assert [option for option in options if option not in helps] == []
