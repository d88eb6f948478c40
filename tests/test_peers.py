"""The comparison with other packages: it runs without them, its truth is true, and it says what is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import layers, peers
from sn_fast import operator_norm, operator_of

SMALLEST = ["4 to 6 channels, 8x8, s2 p0", "4 to 6 channels, 8x8, s2 p1"]


def run(folder: Path, *arguments: str) -> dict:
    out = folder / "peers.json"
    before = torch.get_num_threads()
    peers.main(["--out", str(out), "--repeats", "1", "--threads", str(before), *arguments])
    return json.loads(out.read_text())


def check(found: dict) -> None:
    assert list(found["layers"]) == SMALLEST
    for x in found["layers"].values():
        cells = x["cells"]
        assert list(cells) == list(peers.CANDIDATES)
        assert cells["torch"]["verdict"] == "too small"
        assert cells["operator_norm"]["ratio"] == pytest.approx(1, abs=1e-5)
        low, high = cells["interval"]["ratio"]
        assert 1 - 1e-4 < low <= 1 <= high < 1.05
        for method in ("auto", "circulant", "fft"):
            assert 1 <= cells[f"bound {method}"]["ratio"] < 1.1
        for name in ("operator_norm", "interval", "bound auto", "bound circulant", "bound fft"):
            assert cells[name]["verdict"] == ""
            assert 0 < cells[name]["milliseconds"]["min"] <= cells[name]["milliseconds"]["median"]


def test_without_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peers, "installed", lambda package: None)
    found = run(tmp_path, "--layers", *SMALLEST)
    check(found)
    for x in found["layers"].values():
        for name in ("torchlip", "orthogonium", "normflows"):
            assert x["cells"][name] == {"missing": f"pip install {peers.CANDIDATES[name].package}=={pin(name)}"}
    said = capsys.readouterr().out
    assert "torchlip is not installed: pip install deel-torchlip==1.0.5" in said
    assert said.count("not installed |") == 6


def pin(name: str) -> str:
    return peers.PEERS[peers.CANDIDATES[name].package]


@pytest.mark.skipif(not all(map(peers.installed, peers.PEERS)), reason="pip install -e '.[peers]'")
def test_with_peers(tmp_path: Path) -> None:
    found = run(tmp_path, "--layers", *SMALLEST)
    check(found)
    for x in found["layers"].values():
        assert x["cells"]["torchlip"]["ratio"] == pytest.approx(1.7, abs=0.02)
        assert x["cells"]["orthogonium"]["ratio"] == pytest.approx(1.49, abs=0.02)
        assert x["cells"]["normflows"]["error"] == "RuntimeError"


def test_the_extra_installs_the_versions_that_are_named() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert "peers = [" + ", ".join(f'"{name}=={version}"' for name, version in peers.PEERS.items()) + "]" in text


LARGE = "64 channels, 32x32, s2 p1"


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == LARGE else n for n in layers.LAYERS])
def test_truth(name: str) -> None:
    """Against sn_fast in float64, which shares no line with it; small layers by both ways."""
    layer = layers.LAYERS[name]()
    true, how = layers.truth(layer)
    op = operator_of(layer.module.double(), layer.input_size or None)
    assert float(operator_norm(op, tol=1e-7)) == pytest.approx(true, rel=1e-9)
    assert how == ("Lanczos" if name == LARGE else "SVD")
    if how == "SVD":
        assert layers.lanczos(layer.module, layer.in_shape) == pytest.approx(true, rel=1e-12)


def test_verdicts() -> None:
    assert peers.verdict([0.999], 1.0, 1e-6) == "too small"
    assert peers.verdict([1 - 1e-7], 1.0, 1e-6) == ""
    assert peers.verdict([1 - 1e-7], 1.0, 1e-10) == "too small"
    assert peers.verdict([math.nan], 1.0, 1e-6) == "not finite"
    assert peers.verdict([0.9, 1.1], 1.0, 1e-6) == ""
    assert peers.verdict([0.9, 0.99], 1.0, 1e-6) == "too small"
    assert peers.verdict([1.01, 1.1], 1.0, 1e-6) == "too large"


def test_a_peer_that_fails_is_a_result() -> None:
    def fail(layer: layers.Layer) -> peers.Run:
        raise RuntimeError("first line\nsecond")

    def refuse(layer: layers.Layer) -> peers.Run:
        raise peers.NotOffered("groups")

    layer = layers.LAYERS[SMALLEST[0]]()
    assert peers.value(peers.Candidate(fail, ""), layer, 1.0) == {"error": "RuntimeError", "message": "first line"}
    assert peers.value(peers.Candidate(refuse, ""), layer, 1.0) == {"not_offered": "groups"}
