"""What a release says of itself agrees, wherever it stands. tools/check_release.py installs the built files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import sn_fast

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
URL = "https://github.com/sn-fast/sn_fast"


def test_the_version_stands_in_one_place() -> None:
    assert (ROOT / "sn_fast" / "_version.py").read_text() == f'__version__ = "{sn_fast.__version__}"\n'
    files = (
        "pyproject.toml",
        "setup.py",
        "CITATION.cff",
        "mkdocs.yml",
        "conda/meta.yaml",
        "README.md",
        "docs/index.md",
    )
    assert [name for name in files if sn_fast.__version__ in (ROOT / name).read_text(encoding="utf-8")] == []


def test_the_changelog_begins_with_this_version() -> None:
    heads = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert re.fullmatch(rf"{re.escape(sn_fast.__version__)} \((unreleased|\d{{4}}-\d\d-\d\d)\)", heads[0])
    assert len(heads) == len(set(heads))


@pytest.mark.parametrize("name", ["pyproject.toml", "setup.py", "CITATION.cff", "mkdocs.yml", "conda/meta.yaml"])
def test_one_address(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert URL in text
    assert set(re.findall(r"https://github\.com/[^/\s\"]+/[^/\s\"#]+", text)) == {URL}


def test_the_recipe_of_conda_needs_what_pip_needs() -> None:
    yaml = pytest.importorskip("yaml")
    text = (ROOT / "conda" / "meta.yaml").read_text(encoding="utf-8")
    text = re.sub(r"\{%.*?%\}", "", text).replace("{{ version }}", "1").replace("{{ PYTHON }}", "python")
    recipe = yaml.safe_load(text)
    (pip,) = re.findall(r"^dependencies = \[(.*?)\]", PROJECT, re.MULTILINE)
    (build,) = re.findall(r"^requires = \[(.*?)\]", PROJECT, re.MULTILINE)
    python = re.search(r'requires-python = ">=(.*)"', PROJECT)
    assert python is not None

    def plain(text: str) -> set[str]:
        return {name.replace(" ", "").replace("pytorch", "torch") for name in re.findall(r'"(.*?)"', text)}

    own = {
        key: {x.replace(" ", "").replace("pytorch", "torch") for x in recipe["requirements"][key]}
        for key in ("host", "run")
    }
    assert own["run"] == plain(pip) | {f"python>={python[1]}"}
    assert own["host"] == plain(build) | {f"python>={python[1]}", "pip"}
    assert recipe["build"]["script_env"] == ["SN_FAST_CUDA=0"]


def test_issues_begin_with_the_facts() -> None:
    for name in ("fault", "wish"):
        assert "label: sn-fast info --json" in (ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text()


def test_workflows_run_what_exists() -> None:
    yaml = pytest.importorskip("yaml")
    texts = {path.name: path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(texts) == {"tests.yml", "docs.yml", "wheels.yml"}
    scripts = re.findall(r"(?:python|\"\$PYTHON\"|bash) ([\w./]+\.py|\.ci/run)", "".join(texts.values()))
    assert {"tools/build_release.py", "tools/check_release.py", ".ci/run"} == set(scripts)
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    pythons = yaml.safe_load(texts["tests.yml"])["jobs"]["pure"]["strategy"]["matrix"]["python"]
    assert pythons == re.findall(r"Python :: (3\.\d+)", PROJECT)
    wheels = yaml.safe_load(texts["wheels.yml"])["jobs"]["cuda"]["strategy"]["matrix"]["python"]
    assert wheels == [f"cp{version.replace('.', '')}-cp{version.replace('.', '')}" for version in pythons]


def test_what_the_sdist_must_hold_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import check_release

    assert [name for name in check_release.IN_SDIST if not (ROOT / name).exists()] == []
    assert check_release.RELATIVE_LINK.search("[a](docs/a.md)")
    assert not check_release.RELATIVE_LINK.search("[a](https://a.b/c) [b](#c)")
    sys.modules.pop("check_release")
