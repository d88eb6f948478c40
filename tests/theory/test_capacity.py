"""Capacities against dense matrices and the formulas as they are written."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sn_fast import apply_spectral_norm, frozen_sigma
from sn_fast.lipschitz import lipschitz_bound
from sn_fast.theory import capacity

from .truth import PARAMETERS, dense, norms, phi, slope

SCHEMES = list(PARAMETERS)


def mlp(*widths: int, activation: type[nn.Module] = nn.ELU, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def matrices_of(model: nn.Sequential) -> list[Tensor]:
    return [m.weight.detach() for m in model if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_diagonal_layers(scheme):
    """Norms 2, 3 and 0.5; the ranks of the matrices are 2, 2 and 1."""
    model = mlp(2, 2, 2, 1)
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([2.0, 1.0])))
        model[2].weight.copy_(torch.diag(torch.tensor([3.0, 3.0])))
        model[4].weight.copy_(torch.tensor([[0.3, 0.4]], dtype=torch.float64))
    x = torch.zeros(1, 2, dtype=torch.float64)
    result = capacity(model, scheme, example_input=x, **PARAMETERS[scheme])
    sigma, frobenius = [2.0, 3.0, 0.5], [5**0.5, 18**0.5, 0.5]
    assert float(result) == pytest.approx(phi(scheme, sigma, frobenius, **PARAMETERS[scheme]), rel=1e-9)
    assert result.terms["product"] == pytest.approx(3.0, rel=1e-9)
    assert result.terms["ratio_sum"] == pytest.approx(5 / 4 + 2 + 1, rel=1e-9)
    assert result.terms["L"] == pytest.approx(3 * (2 + 6 + 3), rel=1e-9)
    assert result.terms["spectral_norms"] == pytest.approx({"0": 2.0, "2": 3.0, "4": 0.5}, rel=1e-9)


CONVOLUTIONS = {
    "same": lambda: nn.Conv2d(2, 3, 3, padding=1),
    "strided": lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "valid": lambda: nn.Conv2d(2, 3, (2, 4)),
    "dilated": lambda: nn.Conv2d(2, 3, 2, dilation=2, padding=2),
    "grouped": lambda: nn.Conv2d(2, 4, 3, groups=2, padding=2),
    "reflected": lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1),
}


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_networks_of_convolutions(kind, certified):
    """The kernel's norms, reshaped or not, are other numbers."""
    first = CONVOLUTIONS[kind]()
    x = torch.rand(1, 2, 6, 6, dtype=torch.float64)
    hidden = first.double()(x)
    second = nn.Conv2d(hidden.shape[1], 2, 2, stride=2).double()
    after = second(hidden)
    last = nn.Linear(after.numel(), 3).double()
    model = nn.Sequential(first, nn.ELU(), second, nn.Softplus(), nn.Flatten(), last)
    sigma, frobenius = norms([dense(first, x), dense(second, hidden), dense(last, after.flatten(1))])
    for scheme in SCHEMES:
        parameters = PARAMETERS[scheme]
        result = capacity(model, scheme, example_input=x, certified=certified, **parameters)
        truth = phi(scheme, sigma, frobenius, **parameters)
        assert list(result.terms["frobenius_norms"].values()) == pytest.approx(frobenius, rel=1e-9)
        if certified:
            assert truth <= result.total <= 1.05 * truth
            assert all(a >= b for a, b in zip(result.terms["spectral_norms"].values(), sigma))
            assert result.terms["L"] >= slope(sigma)
        else:
            assert result.total == pytest.approx(truth, rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_grows_with_every_norm(scheme):
    model = mlp(4, 5, 3, 2)
    x = torch.zeros(1, 4, dtype=torch.float64)
    before = float(capacity(model, scheme, example_input=x, **PARAMETERS[scheme]))
    for i in (0, 2, 4):
        larger = copy.deepcopy(model)
        with torch.no_grad():
            u, s, vh = torch.linalg.svd(larger[i].weight, full_matrices=False)
            s[0] *= 1.01
            larger[i].weight.copy_(u * s @ vh)
        assert float(capacity(larger, scheme, example_input=x, **PARAMETERS[scheme])) > before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layers_of_norm_one(scheme):
    """beta = 1: the product is 1, L is the depth, and Phi the factor of the attack times the sum of squares."""
    model = mlp(6, 5, 4, 3)
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight /= torch.linalg.matrix_norm(layer.weight, 2)
    p = PARAMETERS[scheme]
    result = capacity(model, scheme, example_input=torch.zeros(1, 6, dtype=torch.float64), **p)
    squares = sum(float(w.square().sum()) for w in matrices_of(model))
    excess = {
        "erm": 0.0,
        "fgm": 0.3 / 0.2 * 3,
        "pgm": 0.05 / 0.2 * 3 * ((2 * 0.05 / 0.2 * 3) ** 7 - 1) / (2 * 0.05 / 0.2 * 3 - 1),
        "wrm": 3 / (1e4 - 3),
    }[scheme]
    assert result.terms["L"] == pytest.approx(3, rel=1e-9)
    assert result.total == pytest.approx((1 + excess) ** 2 * squares, rel=1e-8)


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_contributions_add_up_to_the_total(scheme, certified):
    x = torch.zeros(1, 4, dtype=torch.float64)
    result = capacity(mlp(4, 5, 3, 2), scheme, example_input=x, certified=certified, **PARAMETERS[scheme])
    assert math.fsum(result.terms["contributions"].values()) == pytest.approx(result.total, rel=1e-10)
    assert math.exp(result.log_total) == pytest.approx(result.total, rel=1e-10)
    factors = (result.terms["product"] * result.terms["attack_factor"]) ** 2 * result.terms["ratio_sum"]
    assert factors == pytest.approx(result.total, rel=1e-10)


def test_limits():
    model, x = mlp(4, 5, 3), torch.zeros(1, 4, dtype=torch.float64)
    erm = float(capacity(model, "erm", example_input=x))
    for p in ({"eps": 0.0, "kappa": 0.1}, {"eps": 1.0, "kappa": math.inf}):
        assert float(capacity(model, "fgm", example_input=x, **p)) == erm
        assert float(capacity(model, "pgm", example_input=x, **p)) == erm
    assert float(capacity(model, "wrm", example_input=x, lam=math.inf)) == erm
    assert float(capacity(model, "wrm", example_input=x, lam=1e12)) == pytest.approx(erm, rel=1e-9)
    assert float(capacity(model, "fgm", example_input=x, eps=1e-12, kappa=1.0)) == pytest.approx(erm, rel=1e-9)
    one_step = capacity(model, "pgm", example_input=x, eps=0.3, kappa=0.1, alpha=0.3, steps=1)
    assert float(one_step) == pytest.approx(float(capacity(model, "fgm", example_input=x, eps=0.3, kappa=0.1)))


def test_pgm_where_the_ratio_of_its_series_is_one():
    """(1 - q^r) / (1 - q) is 0 / 0 there, and without digits nearby."""
    model, x = mlp(4, 5, 3), torch.zeros(1, 4, dtype=torch.float64)
    lipschitz = capacity(model, "erm", example_input=x).terms["L"]
    for nudge in (1.0, 1 + 1e-15, 1 - 1e-12, 1 + 1e-9):
        alpha = 0.1 / (2 * lipschitz) * nudge
        result = capacity(model, "pgm", example_input=x, eps=1.0, kappa=0.1, alpha=alpha, steps=9)
        assert result.terms["attack_factor"] == pytest.approx(1 + 9 / 2, rel=1e-7)
    default = capacity(model, "pgm", example_input=x, eps=1.5, kappa=0.1)
    explicit = capacity(model, "pgm", example_input=x, eps=1.5, kappa=0.1, alpha=0.2, steps=15)
    assert default.log_total == pytest.approx(explicit.log_total)


def test_wrm_needs_a_price_above_the_slope_of_the_gradient():
    model, x = mlp(4, 5, 3), torch.zeros(1, 4, dtype=torch.float64)
    lipschitz = capacity(model, "erm", example_input=x).terms["L"]
    for lam in (lipschitz / 2, lipschitz * (1 - 1e-9)):
        result = capacity(model, "wrm", example_input=x, lam=lam)
        assert math.isinf(float(result))
        assert "L < lam" in result.reason
        assert "L < lam" in str(result)
    above = capacity(model, "wrm", example_input=x, lam=lipschitz * 1.5)
    assert above.terms["attack_factor"] == pytest.approx(3.0)
    assert above.reason == ""
    # Between the norm's estimate and its upper end the certified one is infinite.
    assert math.isinf(float(capacity(model, "wrm", example_input=x, lam=lipschitz, certified=True)))


def test_products_of_many_layers_are_kept_as_logarithms():
    layers: list[nn.Module] = []
    for _ in range(150):
        layer = nn.Linear(3, 3, bias=False).double()
        nn.init.orthogonal_(layer.weight)
        with torch.no_grad():
            layer.weight *= 16
        layers += [layer, nn.Tanh()]
    model, x = nn.Sequential(*layers[:-1]), torch.zeros(1, 3, dtype=torch.float64)
    for certified in (False, True):
        result = capacity(model, "erm", example_input=x, certified=certified)
        assert result.log_total == pytest.approx(300 * math.log(16) + math.log(150 * 3), rel=1e-6)
        assert math.isinf(float(result))
        assert "log_total" in result.reason
    fgm = capacity(model, "fgm", example_input=x, eps=1.0, kappa=1.0)
    assert math.isfinite(fgm.log_total)
    assert fgm.log_total > result.log_total
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight *= 2.0**-9
    small = capacity(model, "erm", example_input=x)
    assert small.log_total == pytest.approx(-300 * math.log(32) + math.log(450), rel=1e-6)
    assert float(small) == 0.0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_l_bounds_the_hessian_of_the_loss(depth):
    """For a loss whose gradient and Hessian in the logits are at most 1; the cross entropy's gradient is sqrt(2)."""
    generator = torch.Generator().manual_seed(1)
    widths = [3] * depth + [4]
    closest = 0.0
    for trial in range(12):
        model = mlp(*widths, 3, activation=[nn.ELU, nn.Tanh, nn.Softplus][trial % 3])
        with torch.no_grad():
            for m in matrices_of(model):
                m *= 0.5 + 2 * trial / 12
        bound = capacity(model, "erm", example_input=torch.zeros(1, 3, dtype=torch.float64), certified=True).terms["L"]
        for _ in range(3):
            x = torch.randn(3, dtype=torch.float64, generator=generator)

            def entropy(v: Tensor, model: nn.Module = model) -> Tensor:
                return F.cross_entropy(model(v[None]), torch.tensor([1]))

            def unit(v: Tensor, model: nn.Module = model) -> Tensor:  # gradient and Hessian of norm at most 1
                return (1 + model(v).square().sum()).sqrt()

            hessian = torch.autograd.functional.hessian(entropy, x)
            assert float(torch.linalg.matrix_norm(hessian, 2)) <= math.sqrt(2) * bound
            steepest = float(torch.linalg.matrix_norm(torch.autograd.functional.hessian(unit, x), 2))
            assert steepest <= bound
            closest = max(closest, steepest / bound)
    assert closest > 0.02  # the bound is not out of sight


def test_l_is_attained_by_a_linear_classifier():
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).double()
    x = torch.zeros(4, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(lambda v: (1 + model(v).square().sum()).sqrt(), x)
    bound = capacity(model, "erm", example_input=x[None]).terms["L"]
    assert float(torch.linalg.matrix_norm(hessian, 2)) == pytest.approx(bound, rel=1e-6)


def test_product_of_erm_is_the_lipschitz_bound():
    """Two ways to one number: pooling and strides included."""
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ELU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Tanh(),
        nn.AvgPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()
    with torch.no_grad():
        model[1].running_var.fill_(0.25)
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    x = torch.rand(2, 1, 13, 13, dtype=torch.float64)
    result = capacity(model, "erm", example_input=x, certified=True)
    assert result.terms["product"] == pytest.approx(lipschitz_bound(model, x).bound, rel=1e-6)
    assert result.terms["scales"]["4"] == pytest.approx(2.0)  # each pixel is in up to two windows per axis
    assert any("MaxPool2d" in note for note in result.notes)
    assert any("running statistics" in note for note in result.notes)
    with pytest.raises(ValueError, match=r"MaxPool2d.*1-Lipschitz derivative"):
        capacity(model, "fgm", example_input=x, eps=0.1, kappa=0.1)


def test_normalised_layers_count_with_the_weight_in_use():
    model = mlp(6, 8, 3, dtype=torch.float32)
    with torch.no_grad():
        model[0].weight *= 10
        model[2].weight *= 10
    x = torch.rand(2, 6)
    apply_spectral_norm(model, x, beta=1.5, n_power_iterations=50)
    result = capacity(model, "erm", example_input=x)
    assert list(result.terms["spectral_norms"].values()) == pytest.approx([1.5, 1.5], rel=1e-4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model[0].eval()
    flags = [m.training for m in model.modules()]
    with frozen_sigma(model):
        frozen = capacity(model, "fgm", example_input=x, eps=0.1, kappa=0.1)
        thawed_terms = frozen.terms["spectral_norms"]
    assert thawed_terms == result.terms["spectral_norms"]
    assert [m.training for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_precisions_agree():
    model = mlp(6, 8, 3)
    exact = capacity(model, "erm", example_input=torch.zeros(1, 6, dtype=torch.float64))
    single = capacity(copy.deepcopy(model).float(), "erm", example_input=torch.zeros(1, 6))
    assert single.log_total == pytest.approx(exact.log_total, rel=1e-5)


def test_a_layer_on_every_row_of_a_sequence_counts_once_per_row():
    model = nn.Sequential(nn.Linear(3, 4), nn.ELU(), nn.Flatten(), nn.Linear(20, 2)).double()
    x = torch.zeros(2, 5, 3, dtype=torch.float64)
    result = capacity(model, "erm", example_input=x)
    truth = dense(model[0], x[:1])
    assert truth.shape == (20, 15)
    assert result.terms["frobenius_norms"]["0"] == pytest.approx(float(truth.norm()), rel=1e-9)
    assert result.terms["width"] == 20


def test_zero_and_shared_layers():
    layer = nn.Linear(3, 3).double()
    tied = nn.Sequential(layer, nn.ELU(), layer)
    x = torch.zeros(1, 3, dtype=torch.float64)
    result = capacity(tied, "erm", example_input=x)
    sigma, frobenius = norms([layer.weight.detach()] * 2)
    assert float(result) == pytest.approx(phi("erm", sigma, frobenius), rel=1e-8)
    assert any("more than once" in note for note in result.notes)
    assert len(result.layers) == 2
    with torch.no_grad():
        layer.weight.zero_()
    zero = capacity(tied, "fgm", example_input=x, eps=1.0, kappa=1.0)
    assert float(zero) == 0.0
    assert zero.log_total == -math.inf
    assert sum(zero.terms["contributions"].values()) == 0


def test_result_as_text_and_as_a_document():
    result = capacity(mlp(4, 5, 3), "fgm", example_input=torch.zeros(1, 4, dtype=torch.float64), eps=0.1, kappa=0.2)
    text = str(result)
    assert "Phi (fgm) = " in text
    assert all(word in text for word in ("spectral", "Frobenius", "note: ", "kappa = 0.2"))
    document = result.to_dict()
    assert document["total"] == float(result)
    assert document["terms"]["eps"] == 0.1
    assert document["notes"] == list(result.notes)


@pytest.mark.parametrize(
    ("scheme", "parameters", "message"),
    [
        ("pgd", {}, "scheme='pgd' is unknown; choose one of erm, fgm, pgm, wrm"),
        ("erm", {"eps": 0.1}, "eps=0.1: scheme='erm' takes no parameters"),
        ("fgm", {"eps": 0.1, "kappa": 1.0, "lam": 2.0}, "lam=2.0: scheme='fgm' takes eps, kappa"),
        ("fgm", {"eps": 0.1}, "needs kappa"),
        ("pgm", {"kappa": 0.1}, "needs eps"),
        ("wrm", {}, "needs lam"),
        ("fgm", {"eps": -0.1, "kappa": 1.0}, "eps=-0.1 must be a finite number >= 0"),
        ("fgm", {"eps": 0.1, "kappa": 0.0}, "kappa=0.0 must be a number > 0"),
        ("fgm", {"eps": math.nan, "kappa": 1.0}, "eps=nan must be"),
        ("fgm", {"eps": "1", "kappa": 1.0}, "eps='1' must be"),
        ("pgm", {"eps": 0.1, "kappa": 1.0, "steps": 0}, "steps=0 must be an integer >= 1"),
        ("pgm", {"eps": 0.1, "kappa": 1.0, "alpha": math.inf}, "alpha=inf must be"),
        ("wrm", {"lam": 0}, "lam=0 must be a number > 0"),
    ],
)
def test_wrong_parameters(scheme, parameters, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        capacity(mlp(2, 2), scheme, example_input=torch.zeros(1, 2, dtype=torch.float64), **parameters)
    assert message in str(error.value)
