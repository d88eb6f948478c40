"""Write docs/cli.md: every option of every command of sn-fast, from the parsers themselves.

python tools/cli_page.py
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from sn_fast.cli import _parser

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
_HEAD = """\
<!-- generated: python tools/cli_page.py -->
# Command line

`sn-fast COMMAND`, which is also `python -m sn_fast COMMAND`. Bad input ends with exit code 2 and one line on stderr,
Ctrl-C with 130, SIGTERM with 143. `sn-fast --version` prints the version.
"""


def page() -> str:
    """The page's text."""
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    parts = [_HEAD]
    for name, parser in commands.choices.items():
        parts.append("\n".join(_command(name, parser)))
    return "\n".join(parts)


def _command(name: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"## sn-fast {name}\n"
    for paragraph in (parser.description or "").strip().split("\n\n"):
        yield _paragraph(paragraph) + "\n"
    yield "| option | |\n|---|---|"
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction) and action.help is not argparse.SUPPRESS:
            yield f"| {_names(action)} | {_meaning(action, parser.prog)} |"
    yield f"\n```sh\n{_examples(parser.epilog or '')}\n```\n"


def _paragraph(text: str) -> str:
    """Lines of the form ``  name   meaning`` as a list, others as running text."""
    lines = [re.fullmatch(r"  (\S+)  +(.*)", line) for line in text.splitlines()]
    found = [line for line in lines if line]
    return (
        "\n".join(f"- `{line[1]}`: {line[2]}" for line in found) if len(found) == len(lines) else " ".join(text.split())
    )


def _names(action: argparse.Action) -> str:
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    value = action.metavar or choices
    shown = "" if action.nargs == 0 else f" {value}"
    names = [f"`{option}{shown}`" for option in action.option_strings] or [f"`{value}`"]
    return _cell(", ".join(names))


def _meaning(action: argparse.Action, program: str) -> str:
    return _cell((action.help or "") % {**vars(action), "prog": program})


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _examples(epilog: str) -> str:
    """The commands of the epilog, without what stands beside them."""
    lines = [line.strip().partition("    ") for line in epilog.splitlines() if "sn-fast" in line]
    return "\n".join(command + (f"  # {note.strip()}" if note else "") for command, _, note in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
