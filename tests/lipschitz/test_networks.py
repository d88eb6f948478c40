"""Bounds of whole networks: never below a Jacobian, and what the model keeps."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import sn_fast
from sn_fast.lipschitz import lipschitz_bound

from ..on_device import DEVICE
from .truth import random_statistics, steepest


class Residual(nn.Module):
    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class Dense(nn.Module):
    """Two layers of a DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        features.append(self.conv1(F.relu(self.norm1(torch.cat(features, 1)))))
        features.append(self.conv2(F.relu(self.norm2(torch.cat(features, 1)))))
        return torch.cat(features, 1)


class OnlyFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 2, 3, 3))
        self.matrix = nn.Parameter(torch.randn(3, 16))
        self.register_buffer("mean", torch.randn(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[0]
        x = F.relu(F.conv2d((x - self.mean) / 0.5, self.kernel, padding=1))
        x = F.dropout(F.max_pool2d(x, 2), training=self.training)
        return F.linear(x.view(n, -1), self.matrix)


def resnet() -> nn.Module:
    body = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Residual(3)]
    return nn.Sequential(*body, Residual(3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


MODELS = {
    "resnet": (resnet, (2, 6, 6)),
    "dense": (Dense, (2, 3, 4)),
    "functions": (OnlyFunctions, (2, 4, 4)),
    "autoencoder": (
        lambda: nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(1, 2, 3, stride=2),
            nn.GELU(),
            nn.ConvTranspose2d(2, 2, 2, stride=2),
            nn.BatchNorm2d(2),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.AvgPool2d(3, 2, 1),
            nn.Softmax(1),
        ),
        (1, 4, 4),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_never_below_the_steepest_jacobian(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    model = random_statistics(make())
    for fold in (True, False):
        report = lipschitz_bound(model, torch.randn(1, *shape, dtype=torch.float64), fold_batchnorm=fold)
        assert steepest(lambda x: model(x[None])[0], shape) <= report.bound < math.inf


ACTIVATIONS = [
    nn.ReLU(),
    nn.Tanh(),
    nn.SiLU(),
    nn.Mish(),
    nn.Hardswish(),
    nn.LeakyReLU(2.0),
    nn.LogSoftmax(1),
    nn.ELU(3),
]


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from(ACTIVATIONS), st.integers(1, 5)), min_size=1, max_size=4), st.integers(1, 5))
def test_random_perceptrons(layers: list[tuple[nn.Module, int]], n: int) -> None:
    modules: list[nn.Module] = []
    width = n
    for activation, next_width in layers:
        modules += [nn.Linear(width, next_width), activation]
        width = next_width
    model = nn.Sequential(*modules).double()
    bound = lipschitz_bound(model, torch.randn(1, n, dtype=torch.float64)).bound
    assert steepest(lambda x: model(x[None])[0], (n,), samples=5, scale=2.0) <= bound


def test_folding_makes_a_resnet_tighter() -> None:
    model, x = random_statistics(resnet()), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    folded, apart = lipschitz_bound(model, x), lipschitz_bound(model, x, fold_batchnorm=False)
    assert folded.bound < 0.9 * apart.bound
    assert "4.conv1 + 4.bn1" in [row.name for row in folded.layers]
    assert {"4.conv1", "4.bn1"} <= {row.name for row in apart.layers}


def test_spectral_normalised_model() -> None:
    def make() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(128, 3)
        )

    x = torch.randn(1, 2, 4, 4)
    model = sn_fast.apply_spectral_norm(make(), x, beta=0.7, mode="scale", n_power_iterations=20)
    bound = lipschitz_bound(model, x).bound
    assert bound == pytest.approx(0.7**3, rel=0.03)
    assert lipschitz_bound(make(), x).bound > 1.2 * bound
    assert [row.kind for row in lipschitz_bound(model, x).layers] == ["Conv2d", "ReLU", "Conv2d", "Flatten", "Linear"]


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_other_parametrizations(norm) -> None:
    class Custom(nn.Module):
        """Not a layer of PyTorch's: traced through, down to its parametrized weight."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    model = nn.Sequential(norm(nn.Linear(5, 4)), nn.ReLU(), norm(Custom())).eval()
    truth = [float(torch.linalg.matrix_norm(m.weight.detach().double(), 2)) for m in (model[0], model[2])]
    assert lipschitz_bound(model, torch.randn(1, 5)).bound == pytest.approx(math.prod(truth), rel=1e-2)


def test_a_subclass_that_computes_something_else_is_traced_through() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Standardised(nn.Conv2d):
        def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(x, 5 * weight, bias)

    class Renamed(nn.Linear):
        def extra_repr(self) -> str:
            return "mine"

    doubled, standardised, renamed = Doubled(3, 4), Standardised(1, 1, 1), Renamed(3, 4)
    x = torch.randn(1, 3)
    truth = 2 * float(torch.linalg.matrix_norm(doubled.weight.detach(), 2))
    assert lipschitz_bound(nn.Sequential(doubled), x).bound == pytest.approx(truth, rel=1e-2)
    truth = 5 * abs(standardised.weight.item())
    assert lipschitz_bound(nn.Sequential(standardised), torch.randn(1, 1, 2, 2)).bound == pytest.approx(truth, rel=1e-2)
    assert lipschitz_bound(nn.Sequential(renamed), x).layers[0].kind == "Renamed"


def test_what_does_not_depend_on_the_input_is_constant() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dead, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
            nn.init.zeros_(self.dead.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.dead(F.layer_norm(x, (3,))).exp()

    assert lipschitz_bound(Constant(), torch.randn(1, 3)).bound == 0.0


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else self.other(x)


def test_untraceable_model_warns_and_reports_its_layers() -> None:
    model = Branching()
    with pytest.warns(UserWarning, match="could not be traced by torch.fx"):
        report = lipschitz_bound(model, torch.ones(1, 3))
    assert math.isinf(report.bound)
    assert "could not be traced" in report.reason
    (row,) = report.layers
    assert row.name == "linear"
    assert row.constant == pytest.approx(float(torch.linalg.matrix_norm(model.linear.weight, 2)), rel=1e-2)
    assert not model.linear._forward_hooks


def test_a_graph_that_is_not_the_model_is_not_trusted() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if isinstance(x, torch.fx.Proxy) else 2 * x

    with pytest.warns(UserWarning, match="something else"):
        assert math.isinf(lipschitz_bound(Double(), torch.ones(1, 3)).bound)


def test_hooks_that_change_what_a_layer_computes_are_noticed() -> None:
    x = torch.randn(1, 3)
    for hook in (lambda module, args, out: 7 * out, lambda module, args, out: out.mul_(7)):
        model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        model[0].register_forward_hook(hook)
        assert "hook" in lipschitz_bound(model, x).reason
    for pre_hook in (lambda module, args: 7 * args[0], lambda module, args: args[0].mul_(7)):
        model = nn.Sequential(nn.ReLU(), nn.Linear(3, 3))
        model[1].register_forward_pre_hook(pre_hook)
        assert "hook" in lipschitz_bound(model, x.abs()).reason
    for folded in (0, 1):
        model = random_statistics(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).float()
        model[folded].register_forward_hook(lambda module, args, out: 7 * out)
        assert "hook" in lipschitz_bound(model, x).reason
    seen = []
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    model[1].register_forward_hook(lambda module, args, out: seen.append(out))
    assert lipschitz_bound(model, x).bound < math.inf
    assert len(seen) == 4  # of the graph, and of the model that it is compared with


def test_nothing_of_the_users_changes() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls, self.last = (
                nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Dropout()),
                0,
                None,
            )

        def forward(self, x: Tensor) -> Tensor:
            self.last = x * torch.ones(3)
            return self.net(self.last)

    model = Remembers().train()
    model.net[1].eval()
    x = -torch.ones(1, 3)
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    attributes, random = set(vars(model)), torch.get_rng_state()
    lipschitz_bound(model, x)
    assert [m.training for m in model.modules()] == flags
    assert set(vars(model)) == attributes
    assert not isinstance(model.last, torch.fx.Proxy)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, -torch.ones(1, 3))
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert all(p.grad is None for p in model.parameters())


def test_wrappers_are_looked_into() -> None:
    model, x = nn.Linear(3, 2), torch.randn(1, 3)
    assert lipschitz_bound(nn.DataParallel(model), x).bound == lipschitz_bound(model, x).bound
    assert lipschitz_bound(torch.compile(model), x).bound == lipschitz_bound(model, x).bound


@pytest.mark.parametrize(
    ("model", "x", "error", "says"),
    [
        (lambda x: x, torch.ones(1, 3), TypeError, "model is a function"),
        (nn.Linear(3, 3), [1.0], TypeError, "example_input is a list"),
        (nn.Linear(3, 3), (), TypeError, "without a tensor"),
        (nn.Linear(3, 3, device="meta"), torch.ones(1, 3), ValueError, "meta device"),
        (nn.Linear(3, 3), torch.ones(1, 3, device="meta"), ValueError, "meta device"),
        (nn.LazyLinear(3), torch.ones(1, 3), ValueError, "run the model once"),
    ],
)
def test_bad_arguments(model, x, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        lipschitz_bound(model, x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_weights_are_named(value: float) -> None:
    model = resnet()
    model[4].conv2.weight.data[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"layer '4\.conv2'"):
        lipschitz_bound(model, torch.randn(1, 2, 6, 6))


def test_nan_that_a_parametrization_makes_is_named() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    model[0].parametrizations.weight.original1.data.zero_()
    with pytest.raises(ValueError, match="layer '0'"):
        lipschitz_bound(model, torch.randn(1, 3))


def test_an_error_of_the_model_is_the_models() -> None:
    with pytest.warns(UserWarning, match="its graph fails"), pytest.raises(RuntimeError, match="shapes"):
        lipschitz_bound(nn.Sequential(nn.Linear(3, 3)), torch.ones(1, 4))


def test_torchvision_models() -> None:
    models = pytest.importorskip("torchvision.models")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = lipschitz_bound(models.squeezenet1_1(num_classes=4).to(DEVICE), torch.randn(1, 3, 32, 32))
        gated = lipschitz_bound(models.shufflenet_v2_x0_5(num_classes=4).to(DEVICE), torch.randn(1, 3, 32, 32))
    assert 0 < report.bound < math.inf
    assert 0 < gated.bound < math.inf
