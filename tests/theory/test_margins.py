"""Margins, and their scales by the formulas as they are written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sn_fast.attacks import pgd
from sn_fast.theory import capacity, margin_scale, margins, normalized_margins

from .truth import dense, norms


def test_lead_of_the_true_class():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0], [-1.0, -1.0, -3.0]])
    assert margins(logits, torch.tensor([0, 2, 1])).tolist() == [1.0, -1.0, 0.0]
    assert margins(logits, [0, 2, 1]).dtype == torch.float32
    assert margins(logits.double(), [0, 2, 1]).dtype == torch.float64
    assert margins(logits.bfloat16(), [0, 2, 1]).tolist() == [1.0, -1.0, 0.0]
    by_loop = [float(row[c] - max(v for i, v in enumerate(row) if i != c)) for row, c in zip(logits, (2, 0, 0))]
    assert margins(logits, [2, 0, 0]).tolist() == by_loop


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_one_logit(shape):
    z = torch.tensor([2.0, -3.0, 0.5, 0.0]).reshape(shape)
    assert margins(z, [1, 0, 0, 1]).tolist() == [2.0, 3.0, -0.5, 0.0]
    assert margins(z, torch.tensor([[1], [0], [0], [1]])[: len(z)].reshape(-1)).tolist() == [2.0, 3.0, -0.5, 0.0]


def test_an_attack_can_climb_the_negative_margin():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
    x_adv = pgd(model, x, y, eps=0.5, loss=lambda logits, y: -margins(logits, y))
    assert bool((margins(model(x_adv), y) < margins(model(x), y)).all())


@pytest.mark.parametrize(
    ("logits", "y", "error", "message"),
    [
        (torch.zeros(2, 3), [0, 3], ValueError, "y has the class 3; give 2 class indices, integers from 0 to 2"),
        (torch.zeros(2, 3), [0, -1], ValueError, "y has the class -1"),
        (torch.zeros(2), [0, 2], ValueError, "y has the class 2; give 2 class indices, integers from 0 to 1"),
        (torch.zeros(2, 3), [0], ValueError, "y has shape"),
        (torch.zeros(2, 3), [0.0, 1.0], ValueError, "y has shape"),
        (torch.zeros(2, 3, 1), [0, 1], ValueError, "logits has shape"),
        (torch.zeros(2, 3).long(), [0, 1], TypeError, "logits has dtype"),
        ([[1.0, 2.0]], [0], TypeError, "logits is a list"),
    ],
)
def test_bad_labels_and_logits(logits, y, error, message):
    with pytest.raises(error, match=message):
        margins(logits, y)


@pytest.fixture
def network() -> tuple[nn.Sequential, torch.Tensor]:
    conv, fc = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Linear(27, 4)
    return nn.Sequential(conv, nn.ELU(), nn.Flatten(), fc).double(), torch.rand(1, 2, 6, 6, dtype=torch.float64)


def test_scales_with_true_norms(network):
    model, x = network
    hidden = torch.zeros(1, 27, dtype=torch.float64)
    (a, b), frobenius = norms([dense(model[0], x), dense(model[3], hidden)])
    correction = math.log(sum(f**2 / s**2 for f, s in zip(frobenius, (a, b)))) / 2
    lipschitz = a * b * (a + a * b)
    wanted = {0: 0.0, 1: math.log(a * b), 2: math.log(a * b * (1 + lipschitz))}
    for mode, value in wanted.items():
        assert margin_scale(model, mode, example_input=x) == pytest.approx(value, abs=1e-5)
        scale = margin_scale(model, mode, example_input=x, extra_correction=True)
        assert scale == pytest.approx(value + correction, abs=1e-5)
    for scheme, mode, p in (("erm", 1, {}), ("fgm", 2, {"eps": 0.6, "kappa": 0.2})):
        phi = capacity(model, scheme, example_input=x, certified=True, **p)
        scale = margin_scale(model, mode, example_input=x, extra_correction=True, eps_over_kappa=3.0, certified=True)
        assert scale == pytest.approx(phi.log_total / 2, abs=1e-9)


def test_published_scales(network):
    """compute_margins of the published analyses, written out for two layers."""
    model, x = network
    (a, b), _ = norms([dense(model[0], x), dense(model[3], torch.zeros(1, 27, dtype=torch.float64))])
    kernels = [float(model[i].weight.detach().norm()) for i in (0, 3)]
    correction = math.log(kernels[0] ** 2 * (6 * 6 * 2 / 4) / a**2 + kernels[1] ** 2 / b**2) / 2
    wanted = {0: 0.0, 1: math.log(a * b), 2: math.log(a * b * (1 + 1 + a))}
    for mode, value in wanted.items():
        options = {"example_input": x, "reference": True}
        assert margin_scale(model, mode, **options) == pytest.approx(value, abs=1e-5)
        scale = margin_scale(model, mode, extra_correction=True, **options)
        assert scale == pytest.approx(value + correction, abs=1e-5)


def test_normalised_margins_are_quotients(network):
    model, x = network
    raw = torch.tensor([1.0, -2.0])
    for mode in (0, 1, 2):
        scale = margin_scale(model, mode, example_input=x)
        result = normalized_margins(raw, model, mode, example_input=x)
        assert result.dtype == torch.float64
        assert result.tolist() == pytest.approx([math.exp(-scale), -2 * math.exp(-scale)])
    assert normalized_margins(raw, model, 0, example_input=x).tolist() == [1.0, -2.0]


def test_a_divisor_beyond_float64_may_leave_a_quotient_within():
    layers: list[nn.Module] = []
    for _ in range(40):
        layers += [nn.Linear(2, 2, bias=False).double(), nn.Tanh()]
        nn.init.eye_(layers[-2].weight)
        layers[-2].weight.data *= 2.0**27
    model, x = nn.Sequential(*layers[:-1]), torch.zeros(1, 2, dtype=torch.float64)
    margin = torch.tensor([1e300], dtype=torch.float64)
    (value,) = normalized_margins(margin, model, 1, example_input=x).tolist()
    assert math.log10(value) == pytest.approx(300 - 40 * 27 * math.log10(2), rel=1e-6)


def test_bad_arguments(network):
    model, x = network
    with pytest.raises(ValueError, match="mode=3 is unknown; choose 0, 1 or 2"):
        margin_scale(model, 3, example_input=x)
    with pytest.raises(ValueError, match=r"eps_over_kappa=2\.0: reference=True has it fixed"):
        margin_scale(model, 2, example_input=x, eps_over_kappa=2.0, reference=True)
    with pytest.raises(ValueError, match="eps_over_kappa=-1"):
        margin_scale(model, 2, example_input=x, eps_over_kappa=-1)
    with pytest.raises(TypeError, match="margins is list"):
        normalized_margins([1.0], model, 1, example_input=x)
    nn.init.zeros_(model[3].weight)
    with pytest.raises(ValueError, match="weight is zero"):
        normalized_margins(torch.ones(2), model, 1, example_input=x)


def test_published_norms_leave_out_what_is_between_the_layers():
    """The published product is of the layers alone, also beside an LRN, pooling and branches."""

    class Branched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1)
            self.between = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2), nn.LocalResponseNorm(3))
            self.unused = nn.Linear(5, 5)
            self.projection = nn.Linear(12, 4)
            self.fc = nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.between(self.conv(x)).flatten(1)
            return self.fc(hidden) + self.projection(hidden)

    torch.manual_seed(1)
    model, x = Branched().double(), torch.rand(1, 2, 6, 6, dtype=torch.float64)
    hidden = torch.zeros(1, 12, dtype=torch.float64)
    matrices = [dense(model.conv, x), dense(model.fc, hidden), dense(model.projection, hidden)]  # in order of use
    sigma, _ = norms(matrices)
    with pytest.raises(ValueError):  # noqa: PT011 - whichever of the three it meets first
        margin_scale(model, 1, example_input=x)
    assert margin_scale(model, 1, example_input=x, reference=True) == pytest.approx(
        math.log(math.prod(sigma)), abs=1e-6
    )
    sums = 1 + 1 + sigma[0] + sigma[0] * sigma[1]
    found = margin_scale(model, 2, example_input=x, reference=True)
    assert found == pytest.approx(math.log(math.prod(sigma) * sums), abs=1e-6)
    kernels = [float(layer.weight.detach().norm()) ** 2 for layer in (model.conv, model.fc, model.projection)]
    ratios = kernels[0] * 72 / 4 / sigma[0] ** 2 + sum(k / s**2 for k, s in zip(kernels[1:], sigma[1:]))
    found = margin_scale(model, 1, example_input=x, extra_correction=True, reference=True)
    assert found == pytest.approx(math.log(math.prod(sigma)) + math.log(ratios) / 2, abs=1e-6)
    assert model.training
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        margin_scale(nn.Flatten(), 1, example_input=x, reference=True)
