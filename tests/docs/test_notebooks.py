"""The notebooks run from the first cell to the last, and the outputs they are stored with are small."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .pages import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_small_and_without_errors(path: Path) -> None:
    assert path.stat().st_size < 100_000
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("/tmp/", "/home/", "/root/") if word in text]
    cells = json.loads(text)["cells"]
    assert any(cell.get("outputs") for cell in cells)
    assert [out for cell in cells for out in cell.get("outputs", []) if out["output_type"] == "error"] == []
    assert all(cell["metadata"] == {} for cell in cells)


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3
