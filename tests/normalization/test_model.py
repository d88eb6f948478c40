"""spectral_norm, apply_spectral_norm, remove_spectral_norm: what they accept, refuse and leave behind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

import sn_fast
from sn_fast import (
    apply_spectral_norm,
    operator_norm,
    operator_of,
    remove_spectral_norm,
    sigmas,
    spectral_norm,
    update_spectral_norm,
)
from sn_fast.normalization.parametrization import SpectralNorm, spectral_norms

X = torch.randn(2, 3, 9, 9)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5))


def true_norm(layer: nn.Module, size: tuple[int, ...] | None = None, *, raw: bool = False) -> float:
    return float(operator_norm(operator_of(layer, size, raw=raw), method="dense"))


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(3, 4, 5, stride=2, padding=2), (11,)),
        (nn.Conv2d(3, 4, (3, 2), padding="same", padding_mode="circular"), (6, 7)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="replicate"), (6, 7)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1), (6, 7)),
        (nn.Conv3d(2, 3, 2, stride=(1, 2, 2)), (4, 5, 6)),
        (nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), (6,)),
        (nn.ConvTranspose2d(3, 4, 4, stride=2, padding=1), (5, 4)),
        (nn.ConvTranspose3d(2, 2, 2, stride=2), (3, 2, 3)),
        (nn.Linear(7, 5), None),
        (nn.Embedding(9, 5), None),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else None,
)
@pytest.mark.parametrize("lazy", [False, True])
def test_every_layer_is_brought_to_beta(layer: nn.Module, size: tuple[int, ...] | None, lazy: bool) -> None:
    layer = copy.deepcopy(layer)
    torch.nn.init.normal_(layer.weight)
    spectral_norm(layer, input_size=None if lazy else size, beta=0.5)
    channels = getattr(layer, "in_channels", None)
    if isinstance(layer, nn.Embedding):
        out = layer(torch.tensor([1, 2]))
    elif size is None:
        out = layer(torch.randn(2, 7))
    else:
        out = layer(torch.randn(2, channels, *size))
    out.sum().backward()
    update_spectral_norm(layer, 100)
    assert true_norm(layer, size) == pytest.approx(0.5, rel=1e-3)


def test_the_reshaped_operator_is_torchs() -> None:
    for make in (lambda: nn.Conv2d(3, 4, 3), lambda: nn.ConvTranspose2d(3, 4, 3), lambda: nn.Linear(6, 4)):
        layer = make()
        twin = copy.deepcopy(layer)
        spectral_norm(layer, operator="reshape", mode="scale")
        update_spectral_norm(layer, 200)
        torch.nn.utils.parametrizations.spectral_norm(twin, n_power_iterations=200)
        torch.testing.assert_close(layer.weight, twin.weight, rtol=1e-4, atol=1e-6)


def test_another_parameter_by_name() -> None:
    cell = nn.LSTMCell(4, 3)
    spectral_norm(cell, "weight_hh", beta=0.1)
    assert float(torch.linalg.matrix_norm(cell.weight_hh.detach(), 2)) == pytest.approx(0.1, rel=1e-3)
    assert list(sigmas(nn.Sequential(cell))) == ["0.weight_hh"]
    bilinear = spectral_norm(nn.Bilinear(3, 4, 5), operator="reshape", beta=0.1)
    bilinear(torch.randn(2, 3), torch.randn(2, 4)).sum().backward()


def test_unknown_size_leaves_the_weight_until_the_first_forward() -> None:
    layer = nn.Conv2d(3, 4, 3)
    weight = layer.weight.detach().clone()
    spectral_norm(layer, beta=0.1)
    assert torch.equal(layer.weight, weight)
    assert sigmas(layer) == {}
    with pytest.raises(ValueError, match="input_size"):
        operator_of(layer)
    layer(input=X)
    assert true_norm(layer) == pytest.approx(0.1, rel=5e-3)


def test_unbatched_input() -> None:
    layer = spectral_norm(nn.Conv2d(3, 4, 3))
    layer(X[0])
    assert layer.parametrizations.weight[0].v.shape == (3, 9, 9)


def test_an_input_larger_than_normalised_for_warns_once() -> None:
    layer = spectral_norm(nn.Conv2d(3, 4, 3), input_size=(9, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(X)
        layer(X[..., :7, :5])  # zero padding: a smaller input has a smaller norm
    with pytest.warns(UserWarning, match=r"normalised for inputs of size \(9, 9\) but is used at \(9, 12\)"):
        layer(torch.randn(1, 3, 9, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(1, 3, 9, 13))


def test_a_circular_layer_warns_at_every_other_size() -> None:
    layer = spectral_norm(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), input_size=(9, 9))
    with pytest.warns(UserWarning, match="normalised for"):
        layer(X[..., :7, :7])


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 1), lambda: nn.Conv2d(3, 4, 4, stride=4)])
def test_a_layer_whose_norm_does_not_depend_on_the_size(make) -> None:
    layer = spectral_norm(make(), input_size="any", beta=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in ((8, 8), (24, 4)):
            layer(torch.randn(1, 3, *size))
            assert true_norm(layer, size) == pytest.approx(0.1, rel=1e-3)


def test_the_norm_grows_with_the_size_under_zero_padding() -> None:
    """What ``covers`` relies on."""
    for _ in range(20):
        weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
        norms = [
            float(operator_norm(sn_fast.ConvOperator(weight, size, stride=2, padding=1), method="dense"))
            for size in ((5, 5), (5, 7), (8, 7), (9, 9))
        ]
        assert norms == sorted(norms)


def test_a_layer_used_at_several_sizes_keeps_the_largest_norm() -> None:
    class Pyramid(nn.Module):
        def __init__(self, **options) -> None:
            super().__init__()
            self.head = nn.Conv2d(2, 3, 3, padding=1, **options)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x[..., :4]).sum() + self.head(x).sum() + self.head(x[..., :2, :]).sum()

    for options in ({}, {"padding_mode": "circular"}):
        model = apply_spectral_norm(Pyramid(**options), torch.randn(1, 2, 8, 8), beta=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randn(1, 2, 8, 8))
        update_spectral_norm(model, 100)
        sizes = [(8, 4), (8, 8), (2, 8)]
        largest = max(true_norm(model.head, size) for size in sizes)
        assert largest == pytest.approx(0.1, rel=2e-3)


def test_apply_learns_the_sizes_without_touching_the_model() -> None:
    model = small()
    model[1].eval()
    buffers = [b.clone() for b in model.buffers()]
    out = copy.deepcopy(model).eval()(X)
    apply_spectral_norm(model, (X[:1],), beta=100.0)
    assert [m.training for m in (model, *model)] == [True, True, False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(model[1].buffers(), buffers))
    assert torch.equal(model.eval()(X), out)
    assert [p.grad for p in model.parameters()] == [None] * 6


def test_include_exclude_and_beta_by_name() -> None:
    model = apply_spectral_norm(small(), X[:1], include=nn.Linear)
    assert list(sigmas(model)) == ["3"]
    model = apply_spectral_norm(small(), X[:1], exclude="^3$")
    assert list(sigmas(model)) == ["0"]
    model = apply_spectral_norm(small(), X[:1], beta={"^0$": 0.1, ".": 0.2})
    update_spectral_norm(model, 100)
    assert true_norm(model[0]) == pytest.approx(0.1, rel=1e-3)
    assert true_norm(model[3]) == pytest.approx(0.2, rel=1e-3)


def test_two_normalised_models_do_not_share_state() -> None:
    a, b = apply_spectral_norm(small(), X[:1]), apply_spectral_norm(small(), X[:1])
    before = b[0].parametrizations.weight[0].v.clone()
    with torch.no_grad():
        a[0].parametrizations.weight.original.mul_(2)
    a(X)
    assert torch.equal(b[0].parametrizations.weight[0].v, before)


@pytest.mark.parametrize("copied", [False, True])
def test_remove_leaves_the_normalised_weight_and_nothing_else(copied: bool) -> None:
    model = apply_spectral_norm(small(), X[:1], beta=0.2)
    other = model
    if copied:
        model = copy.deepcopy(other)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(3)  # pending
    expected = copy.deepcopy(model).eval()(X)
    assert remove_spectral_norm(model) is model
    torch.testing.assert_close(model.eval()(X), expected, rtol=0, atol=0)
    assert type(model[0]) is nn.Conv2d
    assert not model[0]._forward_pre_hooks
    assert set(model.state_dict()) == set(small().state_dict())
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert true_norm(model[0], (9, 9)) == pytest.approx(0.2, rel=5e-3)
    if copied:
        assert list(sigmas(other)) == ["0", "3"]
        other(X)
    with pytest.raises(ValueError, match="no layer here"):
        remove_spectral_norm(model)
    apply_spectral_norm(model, X[:1], beta=0.1)


def test_assigning_the_weight_sets_the_raw_weight() -> None:
    layer = spectral_norm(nn.Linear(4, 3), beta=0.5)
    layer.weight = torch.eye(3, 4)
    update_spectral_norm(layer, 50)
    torch.testing.assert_close(layer.weight, 0.5 * torch.eye(3, 4), rtol=1e-3, atol=1e-3)


def test_training_brings_the_true_norm_to_beta_where_torchs_does_not() -> None:
    """The point of the library: a strided convolution, after training, against its dense SVD."""
    torch.manual_seed(3)
    layers = {"sn_fast": nn.Conv2d(3, 8, 3, stride=2, padding=1), "torch": nn.Conv2d(3, 8, 3, stride=2, padding=1)}
    spectral_norm(layers["sn_fast"], input_size=(9, 9))
    torch.nn.utils.parametrizations.spectral_norm(layers["torch"])
    for layer in layers.values():
        optimizer = torch.optim.SGD(layer.parameters(), 0.05)
        for _ in range(200):
            optimizer.zero_grad()
            layer(torch.randn(8, 3, 9, 9)).square().mean().neg().backward()
            optimizer.step()
    assert true_norm(layers["sn_fast"], (9, 9)) == pytest.approx(1.0, rel=0.1)  # one iteration a step
    assert true_norm(layers["torch"], (9, 9)) > 1.2


def lazy_model() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: spectral_norm(nn.Linear(2, 2), beta=0), "beta=0"),
        (lambda: spectral_norm(nn.Linear(2, 2), beta=float("nan")), "beta=nan"),
        (lambda: spectral_norm(nn.Linear(2, 2), beta=float("inf"), mode="scale"), "finite with mode='scale'"),
        (lambda: spectral_norm(nn.Linear(2, 2), mode="clip"), "mode='clip'"),
        (lambda: spectral_norm(nn.Linear(2, 2), gradient="none"), "gradient='none'"),
        (lambda: spectral_norm(nn.Linear(2, 2), operator="fft"), "operator='fft'"),
        (lambda: spectral_norm(nn.Linear(2, 2), n_power_iterations=0), "n_power_iterations=0"),
        (lambda: spectral_norm(nn.Linear(2, 2), "bias"), "weight has shape (2,)"),
        (lambda: spectral_norm(nn.ReLU()), "no parameter 'weight'"),
        (lambda: spectral_norm(nn.Bilinear(2, 2, 2)), "operator='reshape'"),
        (lambda: spectral_norm(torch.randn(2, 2)), "give a torch.nn.Module"),
        (lambda: spectral_norm(nn.LazyLinear(3)), "lazy parameter"),
        (lambda: spectral_norm(nn.Conv2d(1, 1, 3), input_size=(2, 2)), "does not fit"),
        (lambda: spectral_norm(nn.Conv2d(1, 1, 3), input_size=(8,)), "input_size=(8,)"),
        (lambda: spectral_norm(nn.Conv2d(1, 1, 3), input_size="all"), "input_size='all'"),
        (lambda: spectral_norm(nn.Linear(2, 2), bound=True, gradient="full"), "bound=True"),
        (lambda: spectral_norm(spectral_norm(nn.Linear(2, 2))), "already parametrized by SpectralNorm"),
        (lambda: apply_spectral_norm(nn.Sequential(nn.ReLU()), X), "no layer to normalise"),
        (lambda: apply_spectral_norm(small(), X, exclude="."), "no layer to normalise"),
        (lambda: apply_spectral_norm(small(), X, beta={"head": 1.0}), "pattern 'head' matches no layer"),
        (lambda: apply_spectral_norm(small(), X, beta={"0": 1.0}), "no pattern matches layer '3'"),
        (lambda: apply_spectral_norm(small(), X, beta=-1.0), "layer '0': beta=-1.0"),
        (lambda: update_spectral_norm(spectral_norm(nn.Linear(2, 2)), 0), "n_power_iterations=0"),
    ],
)
def test_bad_input_names_the_argument(call, says: str) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert says in str(error.value)


def test_a_failing_apply_leaves_the_model_as_it_was() -> None:
    model = small()
    model.append(spectral_norm(nn.Linear(5, 5)))
    weight = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="layer '4'"):
        apply_spectral_norm(model, X[:1], beta=0.1)
    assert list(sigmas(model)) == ["4"]
    assert torch.equal(model[0].weight, weight)
    assert type(model[0]) is nn.Conv2d


def test_info() -> None:
    info = sn_fast.info()
    assert info["sn_fast"] == sn_fast.__version__
    assert info["torch"] == torch.__version__
    assert "PyTorch" in info["backend"]


def test_every_layer_is_found_wherever_it_sits() -> None:
    shared = nn.Conv2d(2, 2, 3, padding=1)
    inner = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(nn.Conv2d(2, 2, 1), shared)})

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.nothing = nn.Conv2d(2, 2, 3, padding=1), inner, None
            self.register_module("empty", None)
            self.last = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner["b"](self.inner["a"](self.first(x)))
            return self.last(x.mean(dim=(2, 3)))

    model = apply_spectral_norm(Network(), torch.randn(1, 2, 5, 5))
    wanted = [m for m in model.modules() if isinstance(m, SpectralNorm)]
    assert len(wanted) == 4
    assert set(spectral_norms(model)) == set(wanted)
    assert len(spectral_norms(model)) == 4
    assert spectral_norms(wanted[0]) == wanted[:1]
    assert spectral_norms(model.last) == wanted[-1:]
    wanted[1].add_module("observer", nn.Identity())  # somebody's
    assert set(spectral_norms(model)) == set(wanted)
    before = [m.sigma.clone() for m in wanted]
    for m in wanted:
        m.raw.data *= 2
    update_spectral_norm(model)
    for m, sigma in zip(wanted, before, strict=True):
        torch.testing.assert_close(m.sigma, 2 * sigma, rtol=0.02, atol=0)
