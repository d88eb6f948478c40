"""The code blocks of README.md and of the pages in docs/, and how they are run.

Blocks of one page share their names and run in order, in an empty folder. A comment on the line before a block changes
that: ``<!-- run: needs torchattacks -->`` runs the block alone, where these packages are installed (``data:mnist``:
where the official files are); ``<!-- run: slow -->`` marks the whole page as slow; ``<!-- run: output -->`` compares a
text block with what the Python block before it has printed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SN_FAST_DATA", ROOT.parent / "shared" / "data"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:^<!-- run: ([^\n]*) -->\n)?^( *)```(\w*)[^\n]*\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its text, the line of its first line, and the comment before it."""

    language: str
    code: str
    line: int
    how: str


@dataclass
class Program:
    """Blocks that run in one namespace."""

    page: str
    blocks: list[Block] = field(default_factory=list)
    needs: tuple[str, ...] = ()
    slow: bool = False

    @property
    def name(self) -> str:
        return f"{self.page}:{self.blocks[0].line}" if self.needs else self.page

    def missing(self) -> list[str]:
        """What the program needs and is not here, as a remedy."""
        return [remedy for need in self.needs if (remedy := _remedy(need))]

    def run(self) -> dict[str, object]:
        """Run the blocks in the current folder; the names that they leave."""
        namespace: dict[str, object] = {"__name__": "__main__"}
        printed = io.StringIO()
        for block in self.blocks:
            if block.language != "python":
                check_output(printed.getvalue(), block, self.page)
                continue
            code = "\n" * (block.line - 1) + block.code  # so that tracebacks name the page's own lines
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, self.page, "exec"), namespace)
        return namespace


def check_output(printed: str, shown: Block, page: str) -> None:
    """Raise unless the text is what was printed: its words, and its numbers to 2 %."""
    number = r"\d+(?:\.\d+)?(?:e[-+]?\d+)?"
    pair = (printed, shown.code)
    words, numbers = ([re.split(number, " ".join(t.split())) for t in pair], [re.findall(number, t) for t in pair])
    close = all(abs(float(a) - float(b)) <= 0.02 * max(abs(float(a)), abs(float(b))) for a, b in zip(*numbers))
    if [w.strip() for w in words[0]] != [w.strip() for w in words[1]] or not close:
        raise AssertionError(
            f"{page}, line {shown.line}: the page shows\n{shown.code}\nand the block prints\n{printed}"
        )


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(text: str) -> Iterator[Block]:
    for found in _BLOCK.finditer(text):
        how, indent, language, code = found.groups(default="")
        line = text.count("\n", 0, found.start(4)) + 1
        yield Block(language, re.sub(rf"^{indent}", "", code, flags=re.MULTILINE), line, how)


def programs_of(page: Path) -> list[Program]:
    """The page's Python programs: all its plain blocks, and each block that needs something."""
    whole, alone = Program(name_of(page)), []
    for block in blocks_of(page.read_text(encoding="utf-8")):
        word, _, rest = block.how.partition(" ")
        if block.language == "text" and word == "output":
            whole.blocks.append(block)
        if block.language != "python":
            continue
        if word == "needs":
            alone.append(Program(name_of(page), [block], tuple(re.split(r"[, ]+", rest))))
            continue
        if word not in ("", "slow"):
            raise ValueError(f"{name_of(page)}, line {block.line}: unknown comment 'run: {block.how}'")
        whole.blocks.append(block)
        whole.slow |= word == "slow"
    return ([whole] if whole.blocks else []) + alone


def all_programs() -> list[Program]:
    return [program for page in PAGES for program in programs_of(page)]


def _remedy(need: str) -> str:
    kind, _, name = need.rpartition(":")
    if kind == "data":
        return "" if (DATA / name).exists() else f"no official files of {name} in {DATA} (set SN_FAST_DATA)"
    return "" if importlib.util.find_spec(need) else f"{need} is not installed"
