"""Which networks are chains of layers, and which are refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sn_fast import LinearOperator, MatrixOperator, register_layer
from sn_fast.layers.kinds import unregister_layer
from sn_fast.theory import OutsideSetting, capacity
from sn_fast.theory.network import follow

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Functional(nn.Module):
    """Layers of a module of the user's, in another order than they were made, and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(3, 2)
        self.first = nn.Linear(4, 5)
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(x.size(0), -1)
        x = F.elu(self.first(x))
        x = F.dropout(x, 0.5, self.training)
        x = torch.tanh_(F.linear(x, self.weight))
        return self.last(x.reshape(len(x), -1))


def test_layers_come_in_the_order_of_use():
    torch.manual_seed(0)
    model = Functional()
    twin = nn.Sequential(model.first, nn.ELU(), nn.Linear(5, 3, bias=False), nn.Tanh(), model.last)
    with torch.no_grad():
        twin[2].weight.copy_(model.weight)
    ours, theirs = (capacity(m, "fgm", example_input=X, eps=0.1, kappa=0.3) for m in (model, twin))
    assert ours.log_total == pytest.approx(theirs.log_total, rel=1e-6)
    assert [layer.name for layer in ours.layers][::2] == ["first", "last"]
    assert ours.layers[1].kind == "linear"
    assert "first, last have one" in ours.notes[0]


def test_writing_in_place_is_followed():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            x.tanh_()
            x += 0.5
            return self.b(x)

    network = follow(InPlace(), X)
    assert [layer.name for layer in network.layers] == ["a", "b"]
    assert [step.kind for step in network.between[1]] == ["tanh_"]
    assert any("shifts" in note for note in network.notes)


def test_pooling_at_the_end_and_scaled_inputs_are_multiplied_in():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.register_buffer("mean", torch.tensor(0.3))

        def forward(self, x: Tensor) -> Tensor:
            return self.conv((x - self.mean) / 0.5).mean((2, 3))

    net, x = Net(), torch.rand(1, 1, 4, 4)
    result = capacity(net, "erm", example_input=x)
    assert result.layers[0].scale == pytest.approx(2 / 4)
    assert result.terms["product"] == pytest.approx(result.layers[0].spectral / 2, rel=1e-5)
    assert any("shifts its input" in note for note in result.notes)


def test_a_normalisation_is_folded_into_the_layer_before_it():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ELU(), nn.Linear(3, 2))
    model(torch.randn(32, 4))
    norm = model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -3.0, 0.5]))
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    truth = float(torch.linalg.matrix_norm(scale[:, None] * model[0].weight.detach(), 2))
    layer = capacity(model, "erm", example_input=X).layers[0]
    assert layer.spectral == pytest.approx(truth, rel=1e-5)
    assert layer.name == "0 + 1"


def test_a_registered_layer_is_one_layer():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (0, 1))) * 2

    def operator(module: nn.Module, weight: Tensor, size: object) -> LinearOperator:
        return 2 * MatrixOperator(weight[:, :-1])

    register_layer(Scaled, operator=operator)
    try:
        layer = Scaled(5, 3)
        model = nn.Sequential(layer, nn.ELU(), nn.Linear(3, 2))
        found = capacity(model, "erm", example_input=X, certified=True).layers[0]
        weight = 2 * layer.weight.detach()[:, :-1].double()
        assert found.spectral == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)
        assert found.frobenius == pytest.approx(float(weight.norm()), rel=1e-9)
    finally:
        unregister_layer(Scaled)


def test_a_layer_with_a_forward_of_its_own_is_measured():
    class LowRank(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.down, self.up = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(3, 1))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.down.T @ self.up.T

    layer = LowRank()
    result = capacity(nn.Sequential(layer, nn.ELU(), nn.Linear(3, 2)), "erm", example_input=X)
    weight = (layer.weight + layer.up @ layer.down).detach()
    assert result.layers[0].spectral == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)
    assert result.layers[0].frobenius == pytest.approx(float(weight.norm()), rel=1e-4)


SMOOTH = [nn.ELU(), nn.CELU(), nn.CELU(2.0), nn.Softplus(), nn.Softplus(4.0), nn.Tanh(), nn.Sigmoid(), nn.LogSigmoid()]
SMOOTH += [nn.Tanhshrink(), nn.Identity(), nn.Dropout()]
ROUGH = [
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.ELU(0.5),
    nn.CELU(0.5),
    nn.Softplus(5.0),
    nn.Softsign(),
    nn.Hardtanh(),
    nn.ReLU6(),
]
ROUGH += [nn.PReLU(init=0.1), nn.Sequential(nn.ELU(), nn.ELU())]


def largest_change_of_slope(activation: nn.Module) -> float:
    """The slope of s' between points 1e-4 apart, largest near zero for all of these."""
    x = torch.linspace(-4, 4, 80001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(activation.double().eval()(x[:, None]).sum(), x)
    return float((slope.diff() / x.detach().diff()).abs().max())


@pytest.mark.parametrize("activation", SMOOTH, ids=str)
def test_smooth_activations_are_taken(activation):
    model = nn.Sequential(nn.Linear(4, 3), activation, nn.Linear(3, 2))
    assert float(capacity(model, "fgm", example_input=X, eps=0.1, kappa=1.0)) > 0
    assert largest_change_of_slope(activation) <= 1 + 1e-3
    if isinstance(activation, (nn.Softplus, nn.Sigmoid)):
        assert any("at zero" in note for note in capacity(model, "erm", example_input=X).notes)


@pytest.mark.parametrize("activation", ROUGH, ids=str)
def test_others_are_refused_for_attacks_unless_assumed_smooth(activation):
    model = nn.Sequential(nn.Linear(4, 3), activation, nn.Linear(3, 2))
    erm = float(capacity(model, "erm", example_input=X))
    with pytest.raises(OutsideSetting, match=r"no 1-Lipschitz derivative, which scheme='fgm' needs.*assume_smooth"):
        capacity(model, "fgm", example_input=X, eps=0.1, kappa=1.0)
    assumed = capacity(model, "fgm", example_input=X, eps=0.1, kappa=1.0, assume_smooth=True)
    assert float(assumed) > erm
    assert any("assume_smooth" in note for note in assumed.notes)
    assert largest_change_of_slope(activation) > 1 + 1e-3


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x + self.a(x))


class Two(Residual):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = self.a(x)
        return y, self.b(y)


class Aside(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        torch.tanh(y)
        return self.b(y)


class Decides(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) if float(x.sum()) > 0 else self.b(x)


class Squares(Residual):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * y)


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3), nn.ELU(), nn.Linear(3, 2))
    model[1].register_forward_hook(lambda module, args, out: 2 * out)
    return model


OUTSIDE = {
    "residual": (Residual, "takes more than the result of the step before"),
    "two outputs": (Two, "result of its last layer alone|takes more than"),
    "dead branch": (Aside, "takes more than the result"),
    "control flow": (Decides, "cannot be followed"),
    "square": (Squares, "product of two activations"),
    "gelu": (lambda: nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)), "GELU.*slopes up to 1.129"),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2)), "LayerNorm"),
    "batch statistics": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2)),
        "BatchNorm1d",
    ),
    "softmax at the end": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), "neither a linear layer"),
    "activation at the end": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ELU()), "comes after the last linear layer"),
    "activation at the start": (lambda: nn.Sequential(nn.Tanh(), nn.Linear(4, 3)), "before the first linear layer"),
    "no layer": (lambda: nn.Sequential(nn.Flatten()), "no linear layer"),
    "hook": (hooked, "forward hook"),
    "sorting": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.Softmin(1), nn.Linear(3, 2)),
        "neither a linear layer nor an activation",
    ),
    "own products": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), nn.GELU(), nn.Linear(3, 2)),
        "GELU",
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_networks_outside_the_setting_are_refused(name):
    make, message = OUTSIDE[name]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    with pytest.raises(OutsideSetting, match=message) as error:
        capacity(model, "erm", example_input=X)
    assert "\n" not in str(error.value)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_bad_input():
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(TypeError, match=r"model is a list; give a torch\.nn\.Module"):
        capacity([model], "erm", example_input=X)
    with pytest.raises(TypeError, match=r"example_input is torch\.int64; give a floating-point tensor"):
        capacity(model, "erm", example_input=torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="example_input is tuple"):
        capacity(model, "erm", example_input=(X,))
    with pytest.raises(ValueError, match="fails on example_input at 0: mat1 and mat2"):
        capacity(model, "erm", example_input=torch.zeros(1, 5))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer '0': weight has NaN"):
        capacity(model, "erm", example_input=X)


def test_certificates_need_the_weights():
    class Cumulative(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).cumsum(-1)

    model = nn.Sequential(Cumulative(4, 3), nn.ELU(), nn.Linear(3, 2))
    result = capacity(model, "erm", example_input=X)
    truth = torch.tril(torch.ones(3, 3)) @ model[0].weight.detach()
    assert result.layers[0].spectral == pytest.approx(float(torch.linalg.matrix_norm(truth, 2)), rel=1e-4)
    with pytest.raises(OutsideSetting, match="certified=True: layer '0'"):
        capacity(model, "erm", example_input=X, certified=True)
