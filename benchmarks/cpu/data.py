"""The files of results: one per table, written whole after every row, so that an interrupted run can go on.

    {"schema": 1, "table": ..., "machine": {...}, "versions": {...}, "commit": ..., "date": ..., "finished": true,
     "rows": {key: {..., "load": what the machine had to do at that time beside this, "seconds": of the whole row}}}

Machines have no names here, and no path of one is kept.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import sn_fast
from sn_fast.files import replace_file

from ..gpu_check.results import ROOT, commit, without_paths
from ..peers import PEERS, installed, machine

SCHEMA = 1
FOLDER = ROOT / "benchmarks" / "results" / "cpu"
OTHERS = ("torchattacks", "foolbox")
Rows = Mapping[str, Callable[[], Mapping[str, Any]]]


def measure(
    table: str,
    rows: Rows,
    folder: Path,
    *,
    resume: bool,
    facts: Mapping[str, Any] | None = None,
    only: str = "",
) -> dict[str, Any]:
    """Every row of a table, written as soon as it is there.

    Args:
        resume: keep the rows of the same commit, versions and machine.
        only: regular expression; no new rows but those whose name it matches (re.search).
    """
    path = folder / f"{table}.json"
    found = described(table) | {"facts": dict(facts or {}), "finished": False, "rows": {}}
    old = read(path) if resume else {}
    if old and (old["commit"], old["versions"], old["machine"]) == tuple(
        found[name] for name in ("commit", "versions", "machine")
    ):
        found["rows"] = {key: row for key, row in old["rows"].items() if key in rows}
    for key, run in rows.items():
        if key in found["rows"] or not re.search(only, key):
            continue
        start = time.perf_counter()
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        row = dict(run())
        found["rows"][key] = row | {"load": load, "seconds": round(time.perf_counter() - start, 2)}
        found["rows"] = {name: found["rows"][name] for name in rows if name in found["rows"]}
        write(path, found)
        print(f"{table}: {key}, {found['rows'][key]['seconds']:.0f} s", flush=True)
    found["finished"] = set(found["rows"]) == set(rows)
    write(path, found)
    return found


def described(table: str) -> dict[str, Any]:
    """What a table is of: machine, versions, commit, date."""
    versions = {"sn_fast": sn_fast.__version__, "python": platform.python_version(), "torch": torch.__version__}
    others = {name: installed(name) for name in (*PEERS, *OTHERS)}
    return {
        "schema": SCHEMA,
        "table": table,
        "machine": machine(),
        "versions": versions | others,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def read(path: Path) -> dict[str, Any]:
    """A file of results; empty where it is missing, damaged or of another schema."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if found.get("schema") == SCHEMA else {}


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_paths(dict(content)), indent=1, allow_nan=False, ensure_ascii=False)
    replace_file(path, (text + "\n").encode())


def why_failed(error: Exception) -> dict[str, str]:
    """That a peer fails is a result."""
    return {"error": type(error).__name__, "message": str(error).strip().split("\n")[0][:160]}


def missing(package: str) -> str | None:
    """How to install a package, where it is not there."""
    if installed(package):
        return None
    return f"pip install {package}" + (f"=={PEERS[package]}" if package in PEERS else "")
