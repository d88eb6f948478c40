"""The file of results: one per kind of GPU, written whole or not at all, after every stage.

    {"schema": 1, "device": ..., "rehearsal": false, "stages": {"power": {"status": "ok" | "failed" | "timeout",
     "seconds": ..., "date": ..., "commit": ..., "sources": ..., "machine": {...}, "error": ..., "results": {...}}}}

Times are in microseconds unless the name says otherwise. No path of the machine is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results"
MEASURED = ("sn_fast", "csrc", "benchmarks")  # folders whose contents the results depend on


def read(path: Path) -> dict[str, Any]:
    """The stages of a file; none where it is missing, damaged or of another schema."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found.get("stages", {}) if found.get("schema") == SCHEMA else {}


def get(content: Any, *path: str) -> Any:
    """What lies at the end of a path of keys; None where it leads nowhere."""
    for key in path:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def write(path: Path, content: Any) -> None:
    """Replace a file by JSON at once, so that a reader or a kill never meets half of it."""
    replace_text(path, json.dumps(without_paths(content), indent=1, allow_nan=True) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def without_paths(content: Any) -> Any:
    """Every absolute path in every text cut down to its last name."""
    if isinstance(content, dict):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_paths(value) for value in content]
    if isinstance(content, str):
        return re.sub(r"(?<![\w.\-/])/(?:[\w.@+~\-]+/)+", "", content)
    return content


def file_name(device: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``NVIDIA-H100-80GB-HBM3.json``."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", device).strip("-") + ".json"


def sources_digest(root: Path = ROOT) -> str:
    """Of the code that is measured and of that which measures; results of one digest belong together."""
    digest = hashlib.sha256()
    suffixes = {".py", ".cu", ".cuh", ".h", ".cpp"}
    for folder in MEASURED:
        for path in sorted(p for p in (root / folder).rglob("*") if p.suffix in suffixes):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def commit(root: Path = ROOT) -> str:
    """The checkout's commit, with a + where files differ from it; empty where it is none."""
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
    except OSError:
        return ""
    return head.stdout.strip()[:12] + ("+" if changes.stdout.strip() else "") if head.returncode == 0 else ""
