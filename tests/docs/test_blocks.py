"""Every Python block of README.md and docs/ runs, and what it asserts holds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sn_fast.experiments.data import data_set_names
from sn_fast.experiments.data import registry as data_registry
from sn_fast.experiments.networks import network_names
from sn_fast.experiments.networks import registry as network_registry
from sn_fast.layers import kinds

from .pages import DATA, PAGES, ROOT, Program, all_programs, blocks_of, name_of

PROGRAMS = [pytest.param(p, id=p.name, marks=[pytest.mark.slow] if p.slow else []) for p in all_programs()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds one for figures alone, and a home whose ``data`` has the official files, if they are here."""
    home, empty = tmp_path / "home", tmp_path / "empty"
    home.mkdir()
    (empty / "figures").mkdir(parents=True)
    (home / "data").symlink_to(DATA)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(empty)
    data_set_names(), network_names()  # which fill their registries
    for module, name in ((kinds, "_KINDS"), (data_registry, "_SETS"), (network_registry, "_ARCHITECTURES")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    return empty


@pytest.mark.parametrize("program", PROGRAMS)
def test_python_blocks_run(program: Program, folder: Path) -> None:
    if program.missing():
        pytest.skip("; ".join(program.missing()))
    program.run()
    # A page shows the figures that its blocks write, and no others of that folder.
    written = {path.relative_to(folder).as_posix() for path in folder.glob("figures/*")}
    shown = set(re.findall(r"!\[[^\]]*\]\((figures/[^)]+)\)", (ROOT / program.page).read_text(encoding="utf-8")))
    assert written == (shown if program.page == "docs/gallery.md" else set())


def test_blocks_are_found() -> None:
    names = [program.name for program in all_programs()]
    assert {"README.md", "docs/index.md", "docs/theory.md"} <= set(names)
    assert len(names) == len(set(names)) > 15
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("```") == 2 * len(list(blocks_of(text))), f"{name_of(page)}: a block is not closed"
        languages = {block.language for block in blocks_of(text)}
        assert languages <= {"python", "sh", "text", "toml", "yaml", "bibtex", "diff"}, name_of(page)


def test_comments_before_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n\n<!-- run: needs no_such, data:none -->\n```python\n1\n```\n\n```python\n2\n```\n"
    first, second = blocks_of(text)
    assert (first.how, first.code, first.line) == ("needs no_such, data:none", "1\n", 5)
    assert (second.how, second.code, second.line) == ("", "2\n", 9)
    program = Program("page", [first], ("no_such", "data:none"))
    assert program.missing()[0] == "no_such is not installed"
    assert program.missing()[1].startswith("no official files of none in ")
