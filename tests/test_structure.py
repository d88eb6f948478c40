"""Imports within sn_fast: no circles, and downwards only. Read from the files, so those in functions count too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import chain, pairwise
from pathlib import Path

import pytest

from .on_device import MOVED

ROOT = Path(__file__).parents[1]
PACKAGE = "sn_fast"
# From the bottom. A room imports from lower levels; rooms of one level know nothing of each other.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("_interrupts", "_version", "errors", "files"),
    ("running",),
    ("reference",),
    ("ops",),
    ("info", "layers"),
    ("norms",),
    ("normalization",),
    ("attacks", "lipschitz"),
    ("theory",),
    ("__init__",),  # the public names; those of sn_fast.attacks and sn_fast.theory stay apart
    ("experiments", "inspection"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

Graph = dict[str, dict[str, int]]  # module -> {module that it imports: line}


def import_graph(root: Path) -> Graph:
    """The modules of the package in ``root``, and what each imports of it, wherever the import stands."""
    files = {_module_name(path.relative_to(root)): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    graph: Graph = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        edges: dict[str, int] = {}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for name in _imported(node, package):
                # "from a import b": module a.b, or a name of module a
                target = next((n for n in (name, name.rpartition(".")[0]) if n in files), None)
                if name.partition(".")[0] == PACKAGE:
                    assert target is not None, f"{module}, line {node.lineno}: {name} is no module"  # type: ignore[attr-defined]
                    edges.setdefault(target, node.lineno)  # type: ignore[attr-defined]
        graph[module] = edges
    return graph


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = _absolute("." * node.level + (node.module or ""), package)
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call):
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
            yield _absolute(str(node.args[0].value), package)


def _absolute(name: str, package: str) -> str:
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    parents = package.split(".")
    return ".".join([*parents[: len(parents) - dots + 1], *filter(None, [name[dots:]])])


def circle(graph: Graph) -> list[str]:
    """The modules of one import circle; none if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def upward_imports(graph: Graph) -> list[str]:
    """The imports that do not run downwards from room to room."""
    found = []
    for module, edges in graph.items():
        for target, line in edges.items():
            upper, lower = room_of(module), room_of(target)
            if upper != lower and LEVEL[lower] >= LEVEL[upper]:
                found.append(f"{module}, line {line}: imports {target}")
    return found


def test_every_room_has_one_level() -> None:
    assert {room_of(module) for module in import_graph(ROOT)} == set(LEVEL)
    assert len(LEVEL) == len(list(chain(*LEVELS)))


def test_no_circle() -> None:
    assert circle(import_graph(ROOT)) == []


def test_imports_run_downwards() -> None:
    graph = import_graph(ROOT)
    assert upward_imports(graph) == []
    assert len(graph) > 50  # the files were found
    assert sum(map(len, graph.values())) > 200


FORMS = {
    "at the top": "from {up}{room}.{name} import thing",
    "a module": "from {up}{room} import {name}",
    "absolute": "import sn_fast.{room}.{name}",
    "absolute, from": "from sn_fast.{room} import {name} as other",
    "in a function": "def f():\n    from {up}{room}.{name} import thing\n    return thing",
    "in a method": "class A:\n    def f(self):\n        import sn_fast.{room}.{name} as other\n        return other",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {up}{room}.{name} import thing",
    "with a fallback": "try:\n    from {up}{room} import {name}\nexcept ImportError:\n    {name} = None",
    "by name": "from importlib import import_module\nother = import_module('sn_fast.{room}.{name}')",
    "by relative name": "import importlib\nother = importlib.import_module('{up}{room}.{name}', __package__)",
    "everything": "from {up}{room}.{name} import *",
}


def write(root: Path, modules: dict[str, str]) -> None:
    for name, source in modules.items():
        path = root / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent, root / PACKAGE):
            (folder / "__init__.py").touch()
        path.write_text(source, encoding="utf-8")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [2, 3, 5])
def test_a_circle_is_found(tmp_path: Path, form: str, length: int) -> None:
    names = [f"m{i}" for i in range(length)]
    sources = {f"layers/{a}": f"from .{b} import thing" for a, b in pairwise(names)}
    write(tmp_path, {**sources, f"layers/{names[-1]}": "thing = 1"})
    assert circle(import_graph(tmp_path)) == []
    write(tmp_path, {f"layers/{names[-1]}": FORMS[form].format(up="..", room="layers", name=names[0])})
    assert set(circle(import_graph(tmp_path))) == {f"sn_fast.layers.{name}" for name in names}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        *(("reference", "ops"), ("ops", "layers"), ("layers", "norms"), ("norms", "normalization"), ("layers", "cli")),
        *(("normalization", "lipschitz"), ("normalization", "attacks"), ("attacks", "inspection")),
        *(("lipschitz", "experiments"), ("experiments", "cli"), ("inspection", "cli")),
        *(("attacks", "lipschitz"), ("lipschitz", "attacks"), ("experiments", "inspection")),
        *(("attacks", "theory"), ("lipschitz", "theory"), ("theory", "experiments")),
    ],
)
def test_an_import_upwards_is_found(tmp_path: Path, form: str, lower: str, upper: str) -> None:
    write(tmp_path, {f"{upper}/high": "thing = 1"})
    write(tmp_path, {f"{lower}/low": FORMS[form].format(up="..", room=upper, name="high")})
    graph = import_graph(tmp_path)
    assert circle(graph) == []
    (found,) = upward_imports(graph)
    assert found.startswith(f"sn_fast.{lower}.low, line ")
    assert found.endswith(f"imports sn_fast.{upper}.high")
    if LEVEL[lower] < LEVEL[upper]:
        write(tmp_path, {f"{lower}/low": "thing = 1"})
        write(tmp_path, {f"{upper}/high": FORMS[form].format(up="..", room=lower, name="low")})
        assert upward_imports(import_graph(tmp_path)) == []


@pytest.mark.parametrize("source", ["from .. import thing", "from sn_fast import thing", "import sn_fast"])
def test_the_public_names_are_above_what_they_come_from(tmp_path: Path, source: str) -> None:
    write(tmp_path, {"norms/low": source, "experiments/high": source})
    (found,) = upward_imports(import_graph(tmp_path))
    assert found == "sn_fast.norms.low, line 1: imports sn_fast"


def test_the_folders_of_tests_on_a_device_exist() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/__init__.py")}
    # The others run commands, documents, or only on a GPU: they choose their device themselves.
    assert set(MOVED) == folders - {"inspection", "experiments", "docs", "gpu"}


# -- only the command line words options ------------------------------------------------------------------------------

_OF_THE_COMMAND = ("cli", "_interrupts", "__main__")
_OPTION = re.compile(r"(?<![\w-])--[a-z]")


def options_in_strings(source: str) -> list[str]:
    """The string constants of a program, docstrings apart, that name an option of a command line."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    texts = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [n.value for n in texts if id(n) not in docstrings and _OPTION.search(n.value)]


def test_library_code_names_no_options() -> None:
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        module = _module_name(path.relative_to(ROOT))
        if room_of(module) not in _OF_THE_COMMAND:
            assert options_in_strings(path.read_text(encoding="utf-8")) == [], module


def test_options_in_strings_are_found() -> None:
    message = 'def f(p):\n    """As --out."""\n    raise ValueError(f"argument --{kind}, {p}: use --resume {p}")'
    assert options_in_strings(message) == [": use --resume "]
    assert options_in_strings('style = "--"\nrange = "a--b"') == []


def test_arguments_in_messages_are_arguments() -> None:
    """The name in "argument `name`: ..." is that of a parameter of some function of the same room."""
    for room in ("inspection", "experiments"):
        named: set[str] = set()
        known: set[str] = set()
        for path in sorted((ROOT / PACKAGE / room).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            named |= set(re.findall(r"argument `(\w+)`", text)) | set(re.findall(r'OptionError\(\s*"(\w+)"', text))
            tree = ast.parse(text)
            known |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
            fields = (n for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))
            known |= {node.target.id for node in fields}  # type: ignore[union-attr]
        assert named
        assert named <= known
