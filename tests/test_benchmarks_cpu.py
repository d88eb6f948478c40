"""The CPU's benchmarks: what they call true is true, what they measure can go on, and documents show their data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cpu import attacks, bounds, curves, data, methods, report, tables, training
from benchmarks.cpu.__main__ import main
from benchmarks.cpu.networks import Network, ViT
from sn_fast.inspection import timing

# -- documents --------------------------------------------------------------------------------------------------------


def test_the_document_shows_the_data() -> None:
    text = report.DOCUMENT.read_text(encoding="utf-8")
    assert report.with_tables(text) == text


def test_no_machine_has_a_name_or_a_path_in_the_data() -> None:
    files = sorted(data.FOLDER.glob("*.json"))
    if not files:
        pytest.skip("nothing measured")
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert os.uname().nodename not in text
        assert not any(word in text for word in ("/home/", "/root/", "/tmp/", "hostname"))
        found = json.loads(text)
        assert found["machine"]["cpu"]
        assert found["machine"]["threads"] == 1
        assert found["commit"]
        assert all({"load", "seconds"} <= row.keys() for row in found["rows"].values())


T = {"min": 1.0, "q1": 1.5, "median": 2.0, "q3": 2.5}
TIMED = {"wall_ms": T, "cpu_ms": T, "ratio": T, "turns": 5}


def written(folder: Path, table: str, rows: Mapping[str, Any], **facts: Any) -> None:
    content = data.described(table) | {"facts": facts, "finished": True, "rows": rows}
    data.write(folder / f"{table}.json", content)


def test_what_a_peer_lacks_stays_in_its_table(tmp_path: Path) -> None:
    cells = {
        "sn_fast": TIMED | {"over_truth": [0.99, 1.0]},
        "torch": TIMED | {"over_truth": [0.54, 1.0]},
        "normflows": {"error": "RuntimeError", "message": "sizes differ"},
        "orthogonium": {"not_offered": "normalisation"},
        "deel-torchlip": {"missing": "pip install deel-torchlip==1.0.5"},
    }
    row = {"layers": 3, "methods": cells, "load": 1.0, "seconds": 2.0}
    facts = {n: {"computes": f"what {n} computes", "true_norm": n != "torch"} for n in cells}
    written(tmp_path, "refresh", {"a network": row}, methods=facts)
    text = report.with_tables(f"before\n{report.BEGIN}\nold\n{report.END}\nafter", tmp_path)
    assert text.startswith("before\n")
    assert text.endswith("after")
    for line in (
        "| sn_fast | 2 ms (1.5..2.5) | 2.00 | 0.990 to 1.000 | yes |",
        "| torch | 2 ms (1.5..2.5) | 2.00 | 0.540 to 1.000 | no |",
        "| normflows | RuntimeError |",
        "- normflows, a network: RuntimeError: sizes differ",
        "- orthogonium does not offer normalisation",
        "- deel-torchlip: pip install deel-torchlip==1.0.5",
        "Not measured yet: `python -m benchmarks.cpu steps`.",
    ):
        assert line in text


# -- measuring --------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    calls: list[str] = []

    def row(name: str, error: type[BaseException] | None = None) -> Callable[[], Mapping[str, Any]]:
        def run() -> Mapping[str, Any]:
            calls.append(name)
            if error:
                raise error
            return {"value": len(calls)}

        return run

    with pytest.raises(KeyboardInterrupt):
        data.measure("t", {"a": row("a"), "b": row("b", KeyboardInterrupt)}, tmp_path, resume=False)
    assert not data.read(tmp_path / "t.json")["finished"]
    rows = {"b": row("b"), "a": row("a")}
    found = data.measure("t", rows, tmp_path, resume=True)
    assert calls == ["a", "b", "b"]
    assert found["finished"]
    assert list(found["rows"]) == ["b", "a"]
    assert data.read(tmp_path / "t.json") == found
    old = json.loads((tmp_path / "t.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps(old | {"commit": "another"}))
    assert not data.measure("t", rows, tmp_path, resume=True, only="^a")["finished"]
    assert data.measure("t", rows, tmp_path, resume=True)["finished"]
    assert calls[3:] == ["a", "b"]


def test_paired_times_are_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On clocks that the candidates turn themselves."""
    now = [0]
    for name in ("perf_counter_ns", "process_time_ns"):
        monkeypatch.setattr(timing.time, name, lambda: now[0])

    def takes(milliseconds: int) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + milliseconds * 1_000_000)

    prepared: list[str] = []
    found = timing.paired(
        {"a": takes(10), "b": takes(25)}, turns=4, calls=2, before={"b": lambda: prepared.append("b")}
    )
    assert found["a"]["cpu_ms"]["median"] == 10
    assert found["b"]["wall_ms"] == {"min": 25, "q1": 25, "median": 25, "q3": 25}
    assert found["b"]["ratio"]["median"] == 2.5
    assert found["a"]["turns"] == 4
    assert len(prepared) == 5  # and once to warm up


def test_quartiles() -> None:
    assert timing.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"min": 1.0, "q1": 2.0, "median": 3.0, "q3": 4.0}


def test_slope() -> None:
    assert curves.slope([2, 4, 8, 16], [5 * v**1.5 for v in (2, 4, 8, 16)]) == pytest.approx(1.5)


def test_every_table_has_a_section() -> None:
    assert list(report._SECTIONS) == list(tables.TABLES)


def test_an_unknown_table_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["refesh"])
    assert "unknown table 'refesh'; choose from refresh" in capsys.readouterr().err


# -- truths -----------------------------------------------------------------------------------------------------------

GEOMETRIES = [(4, 6, 8, 3, 1), (6, 4, 9, 3, 2), (3, 5, 10, 5, 2), (4, 4, 6, 2, 2), (5, 3, 7, 1, 1), (3, 4, 11, 7, 3)]


@pytest.mark.parametrize(("cin", "cout", "size", "kernel", "stride"), GEOMETRIES)
def test_bounds_of_the_literature_bound(cin: int, cout: int, size: int, kernel: int, stride: int) -> None:
    torch.manual_seed(size)
    layer = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False).double().requires_grad_(False)
    columns = torch.eye(cin * size * size, dtype=torch.float64).reshape(-1, cin, size, size)
    true = float(torch.linalg.matrix_norm(layer(columns).flatten(1), 2))
    w = layer.weight
    values = {
        "frobenius": bounds.frobenius(w, stride),
        "reshaped": bounds.reshaped(w, stride),
        "fantastic four": bounds.fantastic_four(w, stride),
        "tensor norm": bounds.tensor_norm(w, stride),
        "circular": bounds.gram_iteration_circular(w, stride, 48),
        **{f"spatial {t}": bounds.gram_iteration_spatial(w, stride, t) for t in (1, 2, 3)},
    }
    assert all(true * (1 - 1e-6) <= value <= values["frobenius"] * 1.6 for value in values.values()), values
    assert values["fantastic four"] <= values["reshaped"] * (1 + 1e-6)
    assert values["tensor norm"] <= values["fantastic four"] * (1 + 1e-6)
    assert values["circular"] <= 1.35 * true
    assert values["spatial 3"] < values["spatial 1"] or kernel == 1


def test_polyphase_is_the_strided_convolution() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(5, 3, 3, 3, dtype=torch.float64), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    interleaved = x.reshape(1, 3, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 12, 4, 4)
    strided = nn.functional.conv2d(x, w, stride=2)
    assert torch.allclose(nn.functional.conv2d(interleaved, bounds.polyphase(w, 2)), strided)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))


def test_what_methods_divide_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_TRUTH", 1e-7)
    row = training._refresh(Network(tiny, size=8), quick=True)
    assert row["layers"] == 2
    cells = row["methods"]
    assert set(cells) == set(methods.METHODS) - {"no SN"}
    low, high = cells["sn_fast"]["over_truth"]
    assert 0.97 < low <= high < 1 + 1e-5
    assert cells["torch"]["over_truth"][0] < 0.9
    assert cells["published loop"]["over_truth"][1] < 1 + 1e-5
    assert cells["sn_fast"]["ratio"]["median"] == 1
    assert all(c.keys() & {"cpu_ms", "missing", "not_offered", "error"} for c in cells.values())


def test_steps_train_every_method() -> None:
    for scheme in training.SCHEMES:
        for name in ("no SN", "sn_fast", "torch", "published loop"):
            torch.manual_seed(0)
            normalised = methods.METHODS[name].apply(tiny(), torch.zeros(1, 3, 8, 8))
            before = {n: w.detach().clone() for n, w in normalised.raw.items()}
            x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
            training.step_of(normalised, training.SCHEMES[scheme], x, y)()
            assert all(not torch.equal(before[n], w) for n, w in normalised.raw.items())


def test_the_vision_transformer_has_every_linear() -> None:
    found = methods.layers_of(ViT())
    assert sum(isinstance(m, nn.Linear) for m in found.values()) == 4 * 6 + 1
    assert ViT()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_updates_are_compared_with_float64() -> None:
    for kind in attacks._EAGER:
        row = attacks._update(kind, 2, 8, quick=True)
        assert all(cell["largest_error"] < 1e-6 for cell in row["methods"].values())


def test_attacks_of_equal_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> tuple[nn.Module, torch.Tensor, torch.Tensor, dict[str, float]]:
        torch.manual_seed(0)
        model, x = tiny().eval(), torch.rand(16, 3, 8, 8)
        return model, x, model(x).argmax(dim=1), {"l_inf": 0.1, "l2": 1.0}

    pytest.importorskip("torchattacks")
    pytest.importorskip("foolbox")
    for kind in ("l_inf", "l2"):
        cells = attacks._attack(kind, make, quick=True)["methods"]
        assert math.isclose(cells["sn_fast"]["success"], cells["torchattacks"]["success"], abs_tol=0.1)
        assert math.isclose(cells["sn_fast"]["success"], cells["foolbox"]["success"], abs_tol=0.1)
        assert cells["sn_fast"]["success"] > 0.2
        assert cells["torchattacks"]["differs_by"] < 1e-4
