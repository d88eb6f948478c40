"""The commands in the shell blocks of README.md and docs/ exist, and take the options that they are given."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator

import pytest

from sn_fast.cli import _parser
from sn_fast.errors import UserError

from .pages import PAGES, ROOT, blocks_of, name_of

# Programs of others, which are not looked into.
OTHERS = {"bash", "cd", "conda", "git", "jupyter", "mkdocs", "mypy", "pre-commit", "pytest", "ruff", "torchrun"}


def commands_of(text: str) -> Iterator[str]:
    """One command each: continued lines joined, comments and ``&&`` taken apart."""
    for block in blocks_of(text):
        if block.language == "sh":
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words:
                    end = words.index("&&") if "&&" in words else len(words)
                    yield shlex.join(words[:end])
                    words = words[end + 1 :]


COMMANDS = [(name_of(page), command) for page in PAGES for command in commands_of(page.read_text(encoding="utf-8"))]


class Parsed(BaseException):
    """The arguments were accepted."""


def accept(command: str) -> None:
    """Raise unless the command's program exists and its own parser takes its arguments."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    program = words[0].rpartition("/")[2]
    if program == "sn-fast":
        _parser().parse_args(words[1:])
    elif program == "pip":
        _pip(words[1:])
    elif program == "python":
        _python(words[1:])
    elif program in (".", "source"):
        assert words[1].startswith(".venv/")
    else:
        assert program in OTHERS, f"unknown program: {program}"
        assert program != "bash" or (ROOT / words[1]).is_file()


def _pip(words: list[str]) -> None:
    assert words[0] == "install"
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))
    for word in words[1:]:
        if found := re.fullmatch(r"(?:\.|sn_fast|sn-fast)\[(.*)\]", word):
            assert set(found[1].split(",")) <= extras, f"no such extra: {word}"


def _python(words: list[str]) -> None:
    if words[:2] == ["-m", "venv"]:
        return
    if words == ["setup.py", "build_ext", "--inplace"] or words[:2] == ["-m", "build"]:
        return
    module = words[:1] == ["-m"]
    name, arguments = (words[1], words[2:]) if module else (words[0], words[1:])
    if not module and "parse_args" not in (ROOT / name).read_text():
        assert not arguments
        return
    with pytest.MonkeyPatch.context() as patch:
        parse = argparse.ArgumentParser.parse_args

        def parse_and_stop(self, args=None, namespace=None):
            raise Parsed(parse(self, args, namespace))

        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(sys, "path", [str(ROOT), *sys.path])
        patch.chdir(ROOT)
        with pytest.raises(Parsed):
            runpy.run_module(name, run_name="__main__") if module else runpy.run_path(name, run_name="__main__")


@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_commands_take_the_options_that_are_shown(page: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in re.findall(r"sn_fast/_C\*\.so", command):
        command = command.replace(path, "pyproject.toml")
    accept(command)


@pytest.mark.parametrize(
    "command",
    [
        "sn-fast norms torchvision:resnet50 --tolerance 1",
        "sn-fast measure",
        "pip install '.[no_such]'",
        "python -m benchmarks.peers --no-such-option",
        "python examples/no_such.py",
        "no-such-program",
    ],
)
def test_others_are_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((UserError, AssertionError, SystemExit, FileNotFoundError)):
        accept(command)


def test_options_in_the_text_exist() -> None:
    parsers = _parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    helps = "".join(parser.format_help() for parser in parsers.values())
    helps += (ROOT / "examples" / "train_imagenet.py").read_text(encoding="utf-8")
    for page in ("experiments.md", "measure.md", "digits.md"):
        options = set(re.findall(r"`(--[a-z-]+)", (ROOT / "docs" / page).read_text(encoding="utf-8")))
        assert [option for option in options if option not in helps] == [], page
    assert len(COMMANDS) > 40
