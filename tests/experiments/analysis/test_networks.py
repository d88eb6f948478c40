"""Analyses of networks, on linear ones whose answers are known in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sn_fast.errors import OptionError
from sn_fast.experiments.analysis import (
    by_defence,
    gradient_norm_distributions,
    margin_distributions,
    network_norms,
    norm_gain_distributions,
    perturbed_images,
    robustness_curves,
    sample_statistics,
)
from sn_fast.experiments.data import Samples
from sn_fast.experiments.networks import build_network
from sn_fast.experiments.training import TrainedNetwork, UserError
from sn_fast.experiments.training.adversary import Adversary

from .figure_checks import check_figure, check_files
from .outcomes import config

FGM = Adversary("fgm", "2", 0.5, 1)
LINF = Adversary("pgm", "inf", 0.1, 5)
CLEAN_AND = (0.0, 0.5, 1.0, 2.0)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Sequential:
    """Flatten, then W x + b; in training mode, to see that this is kept."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer)


def opposite(w: Tensor) -> nn.Sequential:
    """Two classes with logits w x and -w x: margin 2 |w x| where it is right, flat gradients along w."""
    return linear(torch.stack((w, -w)))


@pytest.fixture
def samples() -> Samples:
    """More images than a batch of the evaluation, and a last batch that is short."""
    x = torch.randn(263, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    return Samples(x, torch.randint(2, (263,), generator=torch.Generator().manual_seed(4)))


W = torch.tensor([1.0, -2.0, 0.5, 1.5])


def test_accuracy_under_fgm_and_pgm_of_a_linear_classifier(samples):
    """An attack of radius eps moves w x by eps ||w||_q, in the dual norm, towards the boundary or away from it."""
    model = opposite(W)
    attacks = {"FGM": FGM, "PGM ℓ∞": LINF}
    curves = robustness_curves({"ERM": {"plain": model}}, samples, attacks, factors=CLEAN_AND, labels="true")
    assert model.training
    score = (samples.x.flatten(1) @ W) * torch.where(samples.y == 0, 1.0, -1.0)  # above 0: right
    for curve, dual in zip(curves.curves, (W.norm(), W.abs().sum())):
        assert curve.eps == tuple(factor * curve.unit for factor in CLEAN_AND)
        for eps, accuracy in zip(curve.eps, curve.accuracy):
            assert accuracy == pytest.approx(float((score > eps * dual).double().mean()), abs=1e-9)
    predicted = robustness_curves({"ERM": {"plain": model}}, samples, attacks, factors=CLEAN_AND).curves
    for curve, dual in zip(predicted, (W.norm(), W.abs().sum())):
        for eps, accuracy in zip(curve.eps, curve.accuracy):
            # What is wrong is pushed to the right class if it is near enough.
            right = torch.where(score > 0, score > eps * dual, score > -eps * dual)
            assert accuracy == pytest.approx(float(right.double().mean()), abs=1e-9)
    check_figure(curves)


def test_a_panel_for_each_defence_and_attack(samples):
    networks = {d: {n: opposite(W * s) for n, s in (("β = 1", 1), ("no SN (β = ∞)", 9))} for d in ("ERM", "FGM", "WRM")}
    attacks = {"FGM": FGM, "PGM ℓ∞": LINF, "WRM": Adversary("wrm", "2", 0.1, 2)}
    curves = robustness_curves(networks, samples, attacks, factors=(0, 1))
    assert len(curves.figure().axes) == 9
    assert [text.get_text() for text in curves.figure().legends[0].get_texts()] == [
        *("no SN (β = ∞)", "β = 1", "nominal ε"),
    ]
    assert len(curves.rows()) == 3 * 2 * 3 * 2
    check_figure(curves)


def test_a_network_that_is_not_finite_has_no_accuracy(samples):
    broken = linear(torch.full((2, 4), math.nan))
    curves = robustness_curves({"ERM": {"broken": broken, "plain": opposite(W)}}, samples, {"FGM": FGM}, factors=(0, 1))
    assert curves.curves[0].accuracy == (None, None)
    assert None not in curves.curves[1].accuracy
    check_figure(curves)
    with pytest.raises(UserError, match="networks: ERM, broken: a logit became infinite or nan; leave the network out"):
        margin_distributions({"ERM": {"broken": (broken, samples)}})


def summaries(result: Any) -> list[dict[str, Any]]:
    table = result.tables()["summary"]
    return [dict(zip(table.columns, row)) for row in table.rows]


def test_margins_of_a_linear_classifier(samples):
    """Raw: +-2 w x. Mode 1 with the correction divides by ||W||_F, as there is one layer; mode 2 by more."""
    model = opposite(W)
    margin = 2 * (samples.x.flatten(1).double() @ W.double()) * torch.where(samples.y == 0, 1.0, -1.0)
    found = margin_distributions({"ERM": {"true": (model, samples)}}, modes=(0, 1, 2))
    raw, mode1, mode2 = summaries(found)
    sigma = 2**0.5 * float(W.norm())  # rank one: the Frobenius norm too
    assert raw["mean"] == pytest.approx(float(margin.mean()), rel=1e-5)
    assert (raw["0% quantile"], raw["100% quantile"]) == pytest.approx(
        (float(margin.min()), float(margin.max())), rel=1e-5
    )
    assert mode1["50% quantile"] == pytest.approx(float(margin.median()) / sigma, rel=1e-4)
    assert mode2["50% quantile"] == pytest.approx(float(margin.median()) / sigma / (1 + sigma * sigma), rel=1e-4)
    for panel in found.panels:
        (d,) = panel.distributions
        assert sum(d.counts) + d.below + d.above == d.images == len(samples)
    moved = margin_distributions({"FGM": {"true": (model, samples)}}, {"FGM": FGM}, modes=(0,), labels="true")
    shift = 2 * FGM.eps * float(W.norm())
    assert summaries(moved)[0]["mean"] == pytest.approx(float(margin.mean()) - shift, rel=1e-4)
    check_figure(found)


def test_normalised_margins_of_other_sizes_have_panels_of_their_own(samples):
    """Mode 2 divides by sigma (1 + sigma^2) the margins that grow with sigma: 1e4 W has them 1e8 times smaller."""
    members = {name: (opposite(c * W), samples) for name, c in (("small", 1.0), ("large", 1e4))}
    found = margin_distributions({"FGM": members}, modes=(0, 1, 2))
    titles = ["margins", "normalised margins, mode 1"]
    assert [panel.title for panel in found.panels] == [
        *(f"FGM: {title}" for title in titles),
        *(f"FGM, {name}: normalised margins, mode 2" for name in members),
    ]
    (small,), (large,) = (panel.distributions for panel in found.panels[2:])
    assert sum(map(bool, large.counts)) > 5
    norm2 = 2 * float(W @ W)
    assert large.mean / small.mean == pytest.approx((1 + norm2) / (1 + 1e8 * norm2), rel=1e-3)
    check_figure(found)


@pytest.mark.parametrize("length", [17, 21, 29, 31])
def test_titles_of_panels_stay_on_the_page(samples, length):
    members = {name: (opposite(c * W), samples) for name, c in (("no SN (β = ∞)", 1e4), ("β = 1", 1.0))}
    check_figure(margin_distributions({("training images of MNIST " * 2)[:length]: members}, modes=(0, 2)))


def test_panels_may_have_modes_of_their_own(samples):
    groups = {name: {"true": (opposite(W), samples)} for name in ("ERM", "FGM")}
    found = margin_distributions(groups, modes={"ERM": (0, 1), "FGM": (0, 2)})
    assert [panel.title for panel in found.panels] == [
        *("ERM: margins", "ERM: normalised margins, mode 1"),
        *("FGM: margins", "FGM: normalised margins, mode 2"),
    ]
    alike = margin_distributions(groups, modes=(0, 1, 2))
    assert summaries(found)[3] == summaries(alike)[5]
    with pytest.raises(OptionError, match=r"modes=\['ERM'\]: there are none for 'FGM'"):
        margin_distributions(groups, modes={"ERM": (0,)})
    with pytest.raises(OptionError, match=r"choose of 0, 1, 2"):
        margin_distributions(groups, modes={"ERM": (0,), "FGM": (3,)})


def test_panels_have_their_own_bins_and_networks_that_theory_refuses_a_note(samples):
    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = opposite(W)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.fc(x * 2)

    groups = {
        "no SN (β = ∞)": {n: (opposite(1e4 * W), samples) for n in ("true labels", "random labels")},
        "β = 1": {n: (opposite(1e-4 * W), samples) for n in ("true labels", "random labels")},
        "branches": {"true labels": (Branched(), samples)},
    }
    found = margin_distributions(groups, modes=(0, 1))
    large, small = (found.panels[i].distributions[0].edges[-1] for i in (0, 2))
    assert large == pytest.approx(1e8 * small, rel=1e-3)
    assert [bool(panel.note) for panel in found.panels] == [False] * 5 + [True]
    assert found.panels[-1].distributions == ()
    assert "linear layers" in found.panels[-1].note
    as_published = margin_distributions({"branches": groups["branches"]}, modes=(1,), reference=True)
    (row,) = summaries(as_published)
    margin = 6 * (samples.x.flatten(1).double() @ W.double()) * torch.where(samples.y == 0, 1.0, -1.0)
    assert row["50% quantile"] == pytest.approx(float(margin.median()) / (2**0.5 * float(W.norm())), rel=1e-4)
    assert found.panels[-1].note in [row["note"] for row in summaries(found)]
    check_figure(found)


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_gradient_norms_of_a_linear_classifier(samples, scale):
    """loss = -log s(2 w x) of class 0, so its gradient is 2 (1 - p_y) w."""
    p_true = torch.sigmoid(2 * (samples.x.flatten(1).double() @ W.double()) * torch.where(samples.y == 0, 1.0, -1.0))
    norms = 2 * (1 - p_true) * W.double().norm()
    model = opposite(W)
    found = gradient_norm_distributions({"ERM": {"plain": model}}, samples, scale=scale)
    (row,) = summaries(found)
    assert row["mean"] == pytest.approx(float(norms.mean()), rel=1e-5)
    assert row["0% quantile"] == pytest.approx(float(norms.min()), abs=1e-6)  # 1 - p in float32
    assert row["100% quantile"] == pytest.approx(float(norms.max()), rel=1e-5)
    predicted = gradient_norm_distributions({"ERM": {"plain": model}}, samples, labels="predicted", scale=scale)
    least = 2 * (1 - torch.maximum(p_true, 1 - p_true)) * W.double().norm()
    assert summaries(predicted)[0]["mean"] == pytest.approx(float(least.mean()), rel=1e-5)
    assert model.training
    check_figure(found)


def test_gradients_that_vanish_are_counted_beside_a_logarithmic_axis(samples):
    sure = linear(torch.zeros(2, 4), torch.tensor([500.0, 0.0]))  # probability 1 of class 0, gradient 0 in x
    found = gradient_norm_distributions({"ERM": {"plain": opposite(W), "sure": sure}}, samples)
    plain, constant = found.panels[0].distributions
    assert constant.below == len(samples)
    assert plain.below + plain.above <= 0.02 * len(samples)
    assert "sure: 100% further left or zero" in found.figure().axes[0].get_title()
    check_figure(found)


def test_norm_gain_of_a_scaled_rotation(samples, tmp_path):
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    found = norm_gain_distributions({"ERM": {"three": linear(3 * q.float()), "half": linear(q.float() / 2)}}, samples)
    for row, gain in zip(summaries(found), (3.0, 0.5)):
        assert (row["0% quantile"], row["100% quantile"]) == pytest.approx((gain, gain), rel=1e-5)
        assert row["images"] == len(samples)
    check_figure(found)
    check_files(found, tmp_path)
    dark = Samples(torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UserError, match="networks: ERM, plain: a value is infinite or nan"):
        norm_gain_distributions({"ERM": {"plain": opposite(W)}}, dark)


def test_batches_do_not_matter(samples, monkeypatch):
    networks = {"ERM": {"plain": opposite(W)}}
    whole = gradient_norm_distributions(networks, samples), norm_gain_distributions(networks, samples)
    monkeypatch.setattr(sample_statistics, "_BATCH_SIZE", 50)
    parts = gradient_norm_distributions(networks, samples), norm_gain_distributions(networks, samples)
    for a, b in zip(whole, parts):
        assert a.panels[0].distributions[0].quantiles == pytest.approx(b.panels[0].distributions[0].quantiles, rel=1e-5)


def test_norms_measured_anew(samples):
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    trained = TrainedNetwork(None, 2.0, (1, 2, 2), 4, linear(weight))  # type: ignore[arg-type]
    norms = network_norms({"ERM": {"β = 2": trained}})
    (row,) = norms.rows()
    assert row[:4] == ("ERM", "β = 2", 2.0, "1")
    assert row[4] == pytest.approx(4.0, rel=1e-3)
    assert row[6] == pytest.approx(2.0, rel=1e-3)
    check_figure(norms)


def test_perturbed_images(tmp_path):
    x = torch.rand(9, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    w = torch.randn(108, generator=torch.Generator().manual_seed(1))
    model = opposite(w)
    y = (x.flatten(1) @ w < 0).long()
    found = perturbed_images({"a": model, "b": build_network("mlp1_relu", in_channels=3, image_size=6, num_classes=2)},
                             Samples(x, y), FGM, indices=(8, 0, 3))  # fmt: skip
    assert model.training
    assert [image.index for image in found.networks["a"]] == [8, 0, 3]
    for image in found.networks["a"]:
        assert image.clean == image.label == int(y[image.index])
        assert image.l2 == pytest.approx(FGM.eps, rel=1e-5)
        sign = 1.0 if image.label else -1.0
        step = torch.from_numpy(image.perturbation).flatten()
        torch.testing.assert_close(step, sign * FGM.eps * w / w.norm(), rtol=1e-4, atol=1e-6)
        logits = model(x[image.index : image.index + 1] + torch.from_numpy(image.perturbation)).softmax(1)
        assert image.attacked == int(logits.argmax())
        assert image.attacked_confidence == pytest.approx(float(logits.max().detach()), abs=1e-5)
    largest = max(image.linf for images in found.networks.values() for image in images)
    assert found.magnify == pytest.approx(0.5 / largest)
    check_figure(found, images=True)
    check_files(found, tmp_path)


def test_networks_by_defence():
    networks = [
        TrainedNetwork(config(scheme=scheme), beta, (1, 2, 2), 2, opposite(W))
        for scheme, beta in (("pgm", 2.0), ("fgm", 4.0), ("pgm", math.inf), ("pgm", 1.0))
    ]
    found = by_defence(networks)
    assert {d: list(members) for d, members in found.items()} == {
        "PGM": ["no SN (β = ∞)", "β = 1", "β = 2"],
        "FGM": ["β = 4"],
    }
    assert found["PGM"]["β = 2"] is networks[0].model
    with pytest.raises(OptionError, match="two networks have this scheme and beta"):
        by_defence([*networks, networks[1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": {}}, "networks={}: give at least one network"),
        ({"networks": {"ERM": {}}}, "networks='ERM': give at least one network for each panel"),
        ({"samples": None}, "samples='0 images'"),
        ({"attacks": {}}, "attacks={}: give at least one"),
        ({"attacks": {"clean": Adversary("erm", "2", 1.0, 1)}}, "attacks='clean': erm attacks nothing"),
        ({"factors": (0.5, -1)}, "factors=.*at least 0"),
        ({"factors": ()}, "factors="),
        ({"labels": "random"}, "labels='random': choose true or predicted"),
    ],
)
def test_arguments_of_robustness_curves(samples, change, message):
    given: dict[str, Any] = {"networks": {"ERM": {"a": opposite(W)}}, "samples": samples, "attacks": {"FGM": FGM}}
    given |= change
    if given["samples"] is None:
        given["samples"] = Samples(samples.x[:0], samples.y[:0])
    with pytest.raises(OptionError, match=message):
        robustness_curves(**given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda n, s: margin_distributions({"ERM": {"a": (n, s)}}, modes=(3,)), r"modes=\{3\}: choose of 0, 1, 2"),
        (lambda n, s: margin_distributions({"ERM": {"a": (n, s)}}, {"PGM": FGM}), "there is none for 'ERM'"),
        (lambda n, s: gradient_norm_distributions({"ERM": {"a": n}}, s, scale="cube"), "scale='cube': choose linear"),
        (lambda n, s: gradient_norm_distributions({"ERM": {"a": n}}, s, labels="x"), "labels='x'"),
        (lambda n, s: perturbed_images({"a": n}, s, FGM, indices=(999,)), "indices=.*give some of 0 to 262"),
        (lambda n, s: perturbed_images({"a": n}, s, FGM, magnify=0), "magnify=0"),
        (lambda n, s: perturbed_images({}, s, FGM), "networks={}"),
    ],
)
def test_arguments(samples, call, message):
    with pytest.raises(OptionError, match=message):
        call(opposite(W), samples)
