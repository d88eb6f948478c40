"""Links lead somewhere, every public name has a page and a docstring, and what is generated is up to date."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, name_of

URL = "https://github.com/sn-fast/sn_fast"
MODULES = ("sn_fast", "sn_fast.attacks", "sn_fast.theory", "sn_fast.experiments")
SHARED = re.compile(r"as (in )?``|see ``|those of ``|\.\.\.")  # options that another docstring explains
NO_PAGE = {"sn_fast.__version__", *MODULES}  # explained where they are named


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"], ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        if found := re.fullmatch(rf"{URL}/(?:blob|tree)/main/(.*)", place):
            path = ROOT / found[1]
        elif re.match(r"https?://|mailto:", place):
            continue
        else:
            path = page.parent / place if place else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            missing.append(target)
    assert missing == []


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", head.lower()).strip()) for head in heads}


def public_names() -> set[str]:
    return {f"{module}.{name}" for module in MODULES for name in importlib.import_module(module).__all__} - NO_PAGE


def test_every_public_name_is_in_the_reference() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md")]
    listed = re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE)
    assert sorted(listed) == sorted(public_names())


@pytest.mark.parametrize("name", sorted(public_names()))
def test_every_public_name_has_a_docstring(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    assert len(inspect.getdoc(thing) or "") > 30, f"{name} has no docstring"
    if inspect.isfunction(thing) and not SHARED.search(inspect.getdoc(thing) or ""):
        explained = {*re.findall(r"\w+", inspect.getdoc(thing) or ""), "model", "module_or_model"}
        assert [name for name in inspect.signature(thing).parameters if name not in explained] == []


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(path.relative_to(ROOT / "docs").as_posix() for path in PAGES if path.parent != ROOT)


def test_the_page_of_the_commands_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import cli_page

    assert cli_page.PAGE.read_text(encoding="utf-8") == cli_page.page(), "run python tools/cli_page.py"


def test_figures_are_small() -> None:
    figures = [*(ROOT / "docs" / "figures").glob("*"), ROOT / "docs" / "results" / "digits_robustness.png"]
    assert len(figures) > 4
    assert all(path.stat().st_size < 150_000 for path in figures)


def test_table_of_the_training_runs_is_what_was_measured() -> None:
    command = [sys.executable, "examples/digits_table.py", "docs/results/digits_five_seeds.json"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert table in (ROOT / "docs" / "digits.md").read_text(encoding="utf-8")


def test_terms_of_the_theory_are_explained() -> None:
    from .pages import programs_of

    page = ROOT / "docs" / "theory.md"
    (program,) = programs_of(page)
    terms = set(program.run()["fgm"].terms)  # type: ignore[attr-defined]
    table = page.read_text(encoding="utf-8").split("| symbol |")[1].split("\n\n")[0]
    assert terms == (set(re.findall(r"`(\w+)`", table)) | {"scales", "eps", "kappa"}) - {"terms"}
