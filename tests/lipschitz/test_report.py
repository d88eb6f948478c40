"""The report: table, JSON, plot, certified radii."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from sn_fast.lipschitz import LayerBound, LipschitzReport, lipschitz_bound


@pytest.fixture
def report() -> LipschitzReport:
    return lipschitz_bound(
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(1, 4)
    )


@pytest.fixture
def finite() -> LipschitzReport:
    return lipschitz_bound(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(1, 4))


def test_table(report: LipschitzReport, finite: LipschitzReport) -> None:
    head, *rows, end = str(report).splitlines()
    assert head.split() == ["layer", "type", "constant", "bound", "so", "far", "how"]
    assert [row.split()[:2] for row in rows] == [["0", "Linear"], ["1", "LayerNorm"], ["2", "ReLU"], ["3", "Linear"]]
    assert end.startswith("Lipschitz bound: inf (1: divides by")
    assert str(finite).splitlines()[-1] == f"Lipschitz bound: {finite.bound:.6g}"


def test_notebooks_show_a_table(report: LipschitzReport) -> None:
    html = report._repr_html_()
    root = ElementTree.fromstring(f"<div>{html}</div>")
    rows = [[cell.text or "" for cell in row] for row in root.iter("tr")]
    *lines, end = str(report).splitlines()
    assert [" ".join(row).split() for row in rows] == [line.split() for line in lines]
    assert [p.text for p in root.iter("p")] == [end]
    sides = [cell.get("style") for cell in next(root.iter("tr"))]
    assert sides == [f"text-align: {side}" for side in ("left", "left", "right", "right", "left")]


def test_names_are_text_in_html() -> None:
    row = LayerBound("<script>alert(1)</script>", "A&B", 1.0, 1.0, "closed form")
    html = LipschitzReport(1.0, (row,))._repr_html_()
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "A&amp;B" in html


def test_bounds_accumulate(finite: LipschitzReport) -> None:
    constants = [row.constant for row in finite.layers]
    assert finite.layers[-1].bound == finite.bound == pytest.approx(math.prod(constants), rel=1e-14)


def test_json_round_trip(report: LipschitzReport) -> None:
    document = json.loads(report.to_json())
    assert document["bound"] == "inf"
    assert [row["name"] for row in document["layers"]] == ["0", "1", "2", "3"]
    assert [float(row["constant"]) for row in document["layers"]] == [row.constant for row in report.layers]
    assert report.to_dict()["bound"] == math.inf


def test_plot(report: LipschitzReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    for name in ("bars.png", "bars.svg"):
        report.plot(tmp_path / name)
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bars.png", "bars.svg"]
    axes = Figure().subplots()
    report.plot(axes)
    assert len(axes.patches) == 4


def test_plot_without_matplotlib(report: LipschitzReport, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        report.plot(tmp_path / "bars.png")
    assert not list(tmp_path.iterdir())


def test_certified_radius_of_a_linear_classifier() -> None:
    model = nn.Linear(4, 3).double()
    x, y = torch.randn(50, 4, dtype=torch.float64), torch.randint(3, (50,))
    logits = model(x)
    report = lipschitz_bound(model, x[:1])
    radius = report.certified_radius(logits, y)
    # The true distance to each other class's half-space.
    w, own = model.weight, model.weight[y]
    gaps = logits.gather(1, y[:, None]) - logits
    distances = gaps / (own[:, None] - w).norm(dim=2).clamp_min(1e-300)
    distances.scatter_(1, y[:, None], math.inf)
    truth = distances.amin(dim=1).clamp_min(0)
    assert bool((radius <= truth).all())
    assert torch.equal(radius > 0, logits.argmax(1) == y)
    own_prediction = report.certified_radius(logits)
    assert torch.equal(own_prediction[radius > 0], radius[radius > 0])
    assert bool((own_prediction > 0).all())


def test_certified_radius_is_margin_over_root_two_times_bound() -> None:
    report = LipschitzReport(3.0, ())
    logits = torch.tensor([[1.0, 4.0, 2.0], [5.0, 5.0, 0.0]])
    expected = torch.tensor([2 / (math.sqrt(2) * 3), 0.0], dtype=torch.float64)
    torch.testing.assert_close(report.certified_radius(logits), expected)
    torch.testing.assert_close(report.certified_radius(logits, torch.tensor([2, 0])), torch.zeros(2).double())
    assert not LipschitzReport(math.inf, ()).certified_radius(logits).any()
    assert LipschitzReport(0.0, ()).certified_radius(logits).tolist() == [math.inf, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_a_logit_that_is_no_number_certifies_nothing(value: float, place: int, classes: int) -> None:
    logits = torch.randn(3, classes).abs() + 0.1
    logits[1, place % classes] = value
    for bound in (2.0, 0.0, math.inf):
        for y in (None, logits.nan_to_num().argmax(1)):
            radius = LipschitzReport(bound, ()).certified_radius(logits, y)
            assert radius[1] == 0
            assert not radius.isnan().any()


@pytest.mark.parametrize("convert", [lambda y: y, list, Tensor.numpy, Tensor.tolist, lambda y: y.to(torch.int8)])
def test_classes_in_any_form(finite: LipschitzReport, convert: Any) -> None:
    logits, y = torch.randn(6, 4), torch.randint(4, (6,))
    expected = finite.certified_radius(logits, y)
    assert torch.equal(finite.certified_radius(logits, convert(y)), expected)


@pytest.mark.parametrize("wrong", [-1, -100, 3, 255])
@pytest.mark.parametrize("convert", [lambda y: y, Tensor.numpy, Tensor.tolist])
def test_classes_that_do_not_exist(finite: LipschitzReport, wrong: int, convert: Any) -> None:
    with pytest.raises(ValueError, match=rf"class {wrong}\b.*from 0 to 2"):
        finite.certified_radius(torch.randn(4, 3), convert(torch.tensor([0, 2, wrong, 1])))
    with pytest.raises(ValueError, match="from 0 to 1"):
        finite.certified_radius(torch.randn(2), convert(torch.tensor([0, wrong])))


@pytest.mark.parametrize("shape", [(40,), (40, 1)])
def test_binary_classifiers(shape: tuple[int, ...]) -> None:
    model = nn.Linear(4, 1).double()
    x = torch.randn(40, 4, dtype=torch.float64)
    logits, y = model(x).reshape(shape), torch.randint(2, (40,))
    report = lipschitz_bound(model, x[:1])
    distance = logits.detach().reshape(-1).abs() / model.weight.detach().norm()  # to the hyperplane
    correct = (logits.reshape(-1) > 0) == y.bool()
    radius = report.certified_radius(logits, y)
    assert radius.shape == (40,)
    assert bool((radius <= distance * correct).all())
    torch.testing.assert_close(radius, distance * correct, rtol=1e-2, atol=0)
    torch.testing.assert_close(report.certified_radius(logits), distance, rtol=1e-2, atol=0)
    assert torch.equal(report.certified_radius(logits, y[:, None]), radius)
    assert report.certified_radius(torch.zeros(1)).tolist() == [0.0]


def test_certified_radius_at_the_ends_of_float64() -> None:
    huge = torch.tensor([[1.7e308, -1.7e308]], dtype=torch.float64)
    (radius,) = LipschitzReport(1.0, ()).certified_radius(huge).tolist()
    assert radius == pytest.approx(1.7e308 * math.sqrt(2), rel=1e-9) or radius == pytest.approx(1.797e308, rel=1e-3)
    assert math.isfinite(float(LipschitzReport(1e-320, ()).certified_radius(huge)))
    assert LipschitzReport(1.0, ()).certified_radius(torch.zeros(0, 3), []).shape == (0,)


@pytest.mark.parametrize(
    ("logits", "y", "error", "says"),
    [
        (torch.ones(3, 2, 2), None, ValueError, "classes"),
        (torch.ones(()), None, ValueError, "classes"),
        (torch.ones(3, 0), None, ValueError, "classes"),
        ([[1.0, 2.0]], None, TypeError, "logits is a list"),
        (torch.ones(3, 2, dtype=torch.int64), None, TypeError, "floating-point"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), ValueError, "3 class indices"),
        (torch.ones(3, 2), torch.zeros(3, 1, dtype=torch.int64), ValueError, "3 class indices"),
        (torch.ones(3, 2), torch.zeros(3), ValueError, "class indices"),
        (torch.ones(3, 2), 1, ValueError, "class indices"),
        (torch.ones(3, 2), ["a", "b", "c"], ValueError, "class indices"),
        (torch.ones(3, 2), [[0], [1, 1], [0]], ValueError, "class indices"),
    ],
)
def test_certified_radius_refuses_nonsense(
    finite: LipschitzReport, logits: Any, y: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        finite.certified_radius(logits, y)
