"""replace=True: PyTorch's own spectral norm gives way to ours, with its raw weight and, where they fit, its vectors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import sn_fast

from ..on_device import DEVICE
from .cases import norm_of

STYLES: dict[str, Callable[..., nn.Module]] = {
    "hook": nn.utils.spectral_norm,
    "parametrization": parametrizations.spectral_norm,
}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "conv": nn.Conv2d(3, 6, 3, padding=1),
        "deconv": nn.ConvTranspose2d(6, 4, 3, stride=2),
        "linear": nn.Linear(6, 5),
        "table": nn.Embedding(7, 3),
    }


def normalised_by_torch(style: str, layer: nn.Module, n_power_iterations: int = 30) -> nn.Module:
    STYLES[style](layer.to(DEVICE), n_power_iterations=n_power_iterations)
    inputs: dict[type, Tensor] = {
        nn.Conv2d: X,
        nn.ConvTranspose2d: torch.randn(1, 6, 5, 5, device=DEVICE),
        nn.Linear: torch.randn(1, 6, device=DEVICE),
        nn.Embedding: torch.arange(3, device=DEVICE),
    }
    with torch.no_grad():
        layer.train()(inputs[parametrize.type_before_parametrizations(layer)])
    return layer


def raw_and_vectors(layer: nn.Module) -> tuple[nn.Parameter, Tensor, Tensor]:
    if parametrize.is_parametrized(layer):
        theirs = layer.parametrizations.weight
        return theirs.original, theirs[0]._u.clone(), theirs[0]._v.clone()
    return layer.weight_orig, layer.weight_u.clone(), layer.weight_v.clone()


def matrix_of(name: str, weight: Tensor) -> Tensor:
    return (weight.movedim(1, 0) if name == "deconv" else weight).flatten(1).double()


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("name", layers())
@pytest.mark.parametrize("style", STYLES)
def test_weight_and_vectors_of_a_matrix_are_taken_over(style: str, name: str, flipped: bool) -> None:
    layer = normalised_by_torch(style, layers()[name])
    if flipped:  # -u, -v are as good: ours follow the ones that are there
        with torch.no_grad():
            for key, buffer in layer.named_buffers():
                if key.endswith(("_u", "_v")):
                    buffer.neg_()
    raw, u, v = raw_and_vectors(layer)
    before = raw.detach().clone()
    sn_fast.spectral_norm(layer, operator="reshape", mode="scale", replace=True)
    ours = layer.parametrizations.weight
    assert ours.original is raw
    assert torch.equal(raw, before)
    assert not layer._forward_pre_hooks
    assert not layer._state_dict_hooks
    assert not layer._load_state_dict_pre_hooks
    truth = torch.linalg.matrix_norm(matrix_of(name, before), 2)
    assert float(ours[0].sigma) == pytest.approx(float(truth), rel=1e-4)
    assert torch.allclose(ours[0].u, u, atol=1e-2)
    assert torch.allclose(ours[0].v, v, atol=1e-2)
    assert {"weight_orig", "weight_u", "weight_v"}.isdisjoint(layer.state_dict())


def test_one_iteration_from_the_vectors_that_were_there() -> None:
    """Of a flat spectrum, where no start of another kind would come to the same u."""
    torch.manual_seed(1)
    layer = nn.Linear(40, 30).to(DEVICE)
    with torch.no_grad():
        nn.init.orthogonal_(layer.weight).mul_(1 + 1e-4 * torch.randn(30, 1, device=DEVICE))
    x = torch.randn(1, 40, device=DEVICE)
    nn.utils.spectral_norm(layer)
    with torch.no_grad():
        layer(x)
        theirs = copy.deepcopy(layer)
        theirs(x)  # one iteration more
    sn_fast.spectral_norm(layer, mode="scale", replace=True)
    ours = layer.parametrizations.weight[0]
    assert torch.allclose(ours.u, theirs.weight_u, atol=1e-5)
    weight = layer.parametrizations.weight.original.double()
    sigma = theirs.weight_u.double() @ weight @ theirs.weight_v.double()
    assert float(ours.sigma) == pytest.approx(float(sigma), rel=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_vectors_that_do_not_fit_the_weight_are_found_anew(style: str) -> None:
    layer = normalised_by_torch(style, layers()["linear"])
    raw = raw_and_vectors(layer)[0]
    with torch.no_grad():
        raw.copy_(torch.randn_like(raw))
    sn_fast.spectral_norm(layer, mode="scale", replace=True)
    truth = torch.linalg.matrix_norm(raw.detach().double(), 2)
    assert sn_fast.sigmas(layer)[""] == pytest.approx(float(truth), rel=1e-4)


def network(style: str) -> nn.Sequential:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 5)
    ).to(DEVICE)
    for i in (0, 4):  # one is left as it is
        STYLES[style](net[i])
    return net


@pytest.mark.parametrize("style", STYLES)
def test_a_model_in_training_goes_on_with_true_norms(style: str) -> None:
    net = network(style)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    sn_fast.apply_spectral_norm(net, X[:1], mode="scale", replace=True)
    assert {id(p) for p in net.parameters()} == held
    assert list(sn_fast.sigmas(net)) == ["0", "2", "4"]
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.zero_grad()
    net(X).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
    sn_fast.update_spectral_norm(net, 50)
    with torch.no_grad():
        bias = net[0].bias[None, :, None, None]
        assert norm_of(lambda x: net[0](x) - bias, (3, 8, 8)) == pytest.approx(1, rel=1e-3)
        assert norm_of(lambda x: net[4](x) - net[4].bias, (36,)) == pytest.approx(1, rel=1e-3)
    copied = copy.deepcopy(net)
    copied.load_state_dict(net.state_dict())
    sn_fast.remove_spectral_norm(net)
    assert torch.allclose(net.eval()(X), copied.eval()(X), atol=1e-6)


@pytest.mark.parametrize("style", STYLES)
def test_a_copy_of_the_model_keeps_its_own_norm(style: str) -> None:
    net = network(style)
    twin = copy.deepcopy(net)
    outputs = twin.eval()(X)
    sn_fast.apply_spectral_norm(net, X[:1], replace=True)
    assert torch.equal(twin(X), outputs)
    assert "Spectral" in str(twin) or twin[0]._forward_pre_hooks


@pytest.mark.parametrize("style", STYLES)
def test_after_an_error_the_model_is_as_it_was(style: str) -> None:
    net = network(style)
    net.add_module("scaled", nn.Linear(5, 2).to(DEVICE))
    net.scaled.register_forward_hook(lambda module, args, y: 3 * y + 1)
    net.eval()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    outputs, classes = net(X), [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match="layer 'scaled' cannot be normalised"):
        sn_fast.apply_spectral_norm(net, X[:1], replace=True)
    calls: Mapping[str, object] = {"input_size": (0, 0)}
    with pytest.raises(ValueError, match="input_size"):
        sn_fast.spectral_norm(net[0], replace=True, **calls)
    assert classes == [type(m) for m in net.modules()]
    after = net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[n]) for n, t in before.items())
    assert torch.equal(net(X), outputs)
    net.train()(X).sum().backward()  # its iteration goes on
    assert any(not torch.equal(t, net.state_dict()[n]) for n, t in before.items() if n.endswith("_u"))
    sn_fast.apply_spectral_norm(net, X[:1], replace=True, exclude="scaled")
    assert list(sn_fast.sigmas(net)) == ["0", "2", "4"]


def test_on_top_of_another_parametrization() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    layer = nn.Linear(6, 4).to(DEVICE)
    parametrize.register_parametrization(layer, "weight", Doubled())
    parametrizations.spectral_norm(layer)
    raw = layer.parametrizations.weight.original
    sn_fast.spectral_norm(layer, mode="scale", replace=True)
    assert [type(p).__name__ for p in layer.parametrizations.weight] == ["Doubled", "SpectralNorm"]
    truth = torch.linalg.matrix_norm(2 * raw.detach().double(), 2)
    assert sn_fast.sigmas(layer)[""] == pytest.approx(float(truth), rel=1e-3)
    beneath = nn.Linear(6, 4).to(DEVICE)
    parametrizations.spectral_norm(beneath)
    parametrize.register_parametrization(beneath, "weight", Doubled())
    with pytest.raises(ValueError, match="already parametrized by _SpectralNorm, Doubled; remove that first"):
        sn_fast.spectral_norm(beneath, replace=True)


def test_without_a_norm_of_torchs_nothing_is_replaced() -> None:
    layer = sn_fast.spectral_norm(nn.Linear(6, 4).to(DEVICE), replace=True)
    assert list(sn_fast.sigmas(layer)) == [""]
    with pytest.raises(ValueError, match="already parametrized by SpectralNorm; remove that first"):
        sn_fast.spectral_norm(layer, replace=True)
    with pytest.raises(TypeError, match="module is a int"):
        sn_fast.spectral_norm(5, replace=True)


@pytest.mark.parametrize("style", STYLES)
def test_the_error_offers_it(style: str) -> None:
    layer = normalised_by_torch(style, layers()["linear"])
    with pytest.raises(ValueError, match=r"\(replace=True replaces it\); (undo|remove) that first, with "):
        sn_fast.spectral_norm(layer)
