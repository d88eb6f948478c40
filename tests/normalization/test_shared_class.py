"""Normalised layers of one kind share a class: what torch and others do to one of them leaves the others alone."""

from __future__ import annotations

import abc
import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sn_fast


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def pair(cls: type[nn.Module] = nn.Linear) -> list[nn.Module]:
    """Two normalised layers with different weights, and a shape of inputs for both."""
    torch.manual_seed(0)
    return [sn_fast.spectral_norm(cls(4, 3), mode="scale") for _ in range(2)]


def scaled(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Assert that the layer is the affine map of the weight divided by its norm, by singular value decomposition."""
    weight = weight.detach() / torch.linalg.matrix_norm(weight.detach(), 2)
    torch.testing.assert_close(layer(x), x @ weight.T + bias, rtol=1e-5, atol=1e-6)


def test_one_class_for_each_kind() -> None:
    one, other = pair()
    assert type(one) is type(other) is not nn.Linear
    assert type(sn_fast.spectral_norm(nn.Conv2d(2, 2, 1), input_size=4)) is not type(one)
    for layer in (one, other):
        assert isinstance(layer, nn.Linear)
        assert parametrize.type_before_parametrizations(layer) is nn.Linear
        assert type(layer).__name__ == "ParametrizedLinear"
        with pytest.raises(RuntimeError, match="only supported through state_dict"):
            pickle.dumps(layer)


@pytest.mark.parametrize("leave_parametrized", [False, True])
def test_torch_removes_from_one_layer(leave_parametrized: bool) -> None:
    (one, other), x = pair(), torch.randn(5, 4)
    raw, before = one.parametrizations.weight.original.detach().clone(), one(x).detach()
    parametrize.remove_parametrizations(one, "weight", leave_parametrized=leave_parametrized)
    assert type(one) is nn.Linear
    assert isinstance(one.weight, nn.Parameter)
    torch.testing.assert_close(one(x), before if leave_parametrized else x @ raw.T + one.bias)
    scaled(other, x, other.parametrizations.weight.original, other.bias)
    sn_fast.spectral_norm(one)
    assert type(one) is type(other)


def test_torch_parametrizes_another_tensor_of_one_layer() -> None:
    (one, other), x = pair(), torch.randn(5, 4)
    biases = one.bias.detach().clone(), other.bias.detach().clone()
    parametrize.register_parametrization(one, "bias", Doubled())
    scaled(one, x, one.parametrizations.weight.original, 2 * biases[0])
    scaled(other, x, other.parametrizations.weight.original, biases[1])
    assert isinstance(other.bias, nn.Parameter)
    assert {name for name, _ in other.named_parameters()} == {"bias", "parametrizations.weight.original"}
    other.bias = nn.Parameter(torch.ones(3))
    scaled(other, x, other.parametrizations.weight.original, torch.ones(3))
    other.bias = None
    scaled(other, x, other.parametrizations.weight.original, torch.zeros(3))
    with pytest.raises(AttributeError, match="nothing"):
        _ = other.nothing
    parametrize.remove_parametrizations(one, "weight")
    torch.testing.assert_close(one(x), x @ one.weight.T + 2 * biases[0])
    parametrize.remove_parametrizations(one, "bias", leave_parametrized=False)
    assert type(one) is nn.Linear
    assert torch.equal(one.bias, biases[0])
    compiled = torch.compile(sn_fast.spectral_norm(nn.Linear(4, 3)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), compiled._orig_mod(x))


def test_a_plain_attribute_in_place_of_a_parameter() -> None:
    """As FSDP1 and torch.nn.utils.prune put one there."""
    (one, other), x = pair(), torch.randn(5, 4)
    parametrize.register_parametrization(one, "bias", Doubled())
    bias = other._parameters.pop("bias")
    other.bias = 3 * bias
    scaled(other, x, other.parametrizations.weight.original, 3 * bias)
    del other.bias
    with pytest.raises(AttributeError, match="bias"):
        _ = other.bias
    with pytest.raises(AttributeError, match="weight"):
        del other.weight


def test_parametrizations_on_the_same_weight() -> None:
    (one, other), x = pair(), torch.randn(5, 4)
    parametrize.register_parametrization(one, "weight", Doubled())
    scaled(other, x, other.parametrizations.weight.original, other.bias)
    weight = one.parametrizations.weight.original.detach()
    torch.testing.assert_close(one.weight, 2 * weight / torch.linalg.matrix_norm(weight, 2), rtol=1e-5, atol=1e-6)


def test_a_layer_that_others_have_parametrized_keeps_its_class() -> None:
    layer = nn.Linear(4, 3)
    parametrize.register_parametrization(layer, "bias", Doubled())
    before = type(layer)
    sn_fast.spectral_norm(layer, mode="scale")
    assert type(layer) is before
    twin = copy.deepcopy(layer)
    sn_fast.remove_spectral_norm(layer)
    weight = twin.parametrizations.weight.original
    scaled(twin, torch.randn(5, 4), weight, 2 * twin.parametrizations.bias.original)


def test_copies() -> None:
    (one, other), x = pair(), torch.randn(5, 4)
    twin = copy.deepcopy(one)
    assert type(twin) is type(one)
    with torch.no_grad():
        one.parametrizations.weight.original.normal_()
    scaled(twin, x, twin.parametrizations.weight.original, twin.bias)
    sn_fast.remove_spectral_norm(one)
    for layer in (twin, other):
        scaled(layer, x, layer.parametrizations.weight.original, layer.bias)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_cached_weights_are_each_layers_own() -> None:
    layers = pair()
    layers.append(copy.deepcopy(layers[0]))
    layers[2].parametrizations.weight.original.data.neg_()
    with parametrize.cached():
        weights = [layer.weight for layer in layers]
        for layer, weight in zip(layers, weights):
            assert layer.weight is weight
            with pytest.raises(RuntimeError, match="Cannot trace"):
                torch.jit.trace(layer, torch.randn(2, 4))
    torch.testing.assert_close(weights[2], -weights[0])
    assert not torch.allclose(weights[0].abs(), weights[1].abs())


class Abstract(nn.Linear, abc.ABC):
    pass


def test_a_class_with_a_metaclass_of_its_own() -> None:
    (one, other), x = pair(Abstract), torch.randn(5, 4)
    assert type(one) is type(other)
    assert isinstance(type(one), abc.ABCMeta)
    parametrize.remove_parametrizations(one, "weight")
    assert type(one) is Abstract
    scaled(other, x, other.parametrizations.weight.original, other.bias)


def test_a_class_goes_with_its_last_layer() -> None:
    cls = type("Local", (nn.Linear,), {})
    layers = pair(cls)
    shared = weakref.ref(type(layers[0]))
    del layers, cls
    gc.collect()
    assert shared() is None
