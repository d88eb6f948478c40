"""Layers without memory: their operations alone say whether they are the map of their parameter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sn_fast

from .own_maps import BY_PRODUCTS, KINDS, NOT_LINEAR, OF_ONE_WEIGHT, call, norm_of


def of(forward: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., nn.Module]:
    """A maker of layers of a subclass with this forward."""

    def make(cls: type[nn.Module], *args: object, **kwargs: object) -> nn.Module:
        return type("Own", (cls,), {"forward": forward})(*args, **kwargs)

    return make


def shifted(m: nn.Module, x: Tensor) -> Tensor:
    return call(m, x, m.weight) + 3


def by_a_view(m: nn.Module, x: Tensor) -> Tensor:
    return call(m, x, m.weight.flatten(1).view_as(m.weight))


def written(m: nn.Module, x: Tensor) -> Tensor:
    m.weight.data.mul_(2)
    return call(m, x, m.weight)


SAME = {"itself": of(lambda m, x: call(m, x, m.weight)), "shifted": of(shifted), "by a view": of(by_a_view)}
OTHERS = {
    "doubled weight": of(lambda m, x: call(m, x, 2 * m.weight)),
    "doubled input": of(lambda m, x: call(m, 2 * x, m.weight)),
    "turned weight": of(lambda m, x: call(m, x, m.weight.flip(-1))),
    "written weight": of(written),
    "read weight": of(lambda m, x: call(m, x, m.weight) * float(m.weight.norm())),
}


def on_meta(make: Callable[..., nn.Module], kind: str) -> tuple[nn.Module, tuple[int, ...]]:
    cls, args, kwargs, shape = KINDS[kind]
    return make(cls, *args, **kwargs).to("meta"), shape


def filled(model: nn.Module) -> nn.Module:
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", SAME)
def test_a_forward_that_applies_the_parameter_is_normalised(kind: str, variant: str) -> None:
    layer, shape = on_meta(SAME[variant], kind)
    sn_fast.spectral_norm(layer, input_size=shape[1:] or None, mode="scale")
    model, _ = on_meta(SAME[variant], kind)
    model = nn.Sequential(model)
    sn_fast.apply_spectral_norm(model, torch.randn(1, *shape), mode="scale")
    for module in (layer, filled(model)[0]):
        filled(module)(torch.randn(1, *shape))
        assert norm_of(module, *shape) == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
@pytest.mark.parametrize("variant", OTHERS)
def test_other_maps_are_refused_with_the_reason(kind: str, variant: str) -> None:
    layer, shape = on_meta(OTHERS[variant], kind)
    why = "overrides 'forward' of .*(meta device.*load or initialise the weights first|its forward fails)"
    with pytest.raises(ValueError, match=why):
        sn_fast.spectral_norm(layer, input_size=shape[1:] or None)
    refused = (
        f"layer '0' cannot be normalised by its weight: Own {why}|the model's forward fails on the meta device.*load"
    )
    with pytest.raises(ValueError, match=refused):
        sn_fast.apply_spectral_norm(nn.Sequential(layer), torch.randn(1, *shape))
    assert not hasattr(layer, "parametrizations")


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
def test_what_is_refused_with_values_is_refused_without(kind: str) -> None:
    changed = {name: make for name, (make, _) in NOT_LINEAR.items()} | OF_ONE_WEIGHT | BY_PRODUCTS
    for variant, make in changed.items():
        if variant.startswith(("pruned", "weight_norm", "parametrized")):
            continue  # nothing to do with the forward
        cls, args, kwargs, shape = KINDS[kind]
        try:
            sn_fast.spectral_norm(make(cls, *args, **kwargs), input_size=shape[1:] or None)
        except ValueError:
            with pytest.raises(ValueError, match="cannot be normalised"):
                sn_fast.spectral_norm(make(cls, *args, **kwargs).to("meta"), input_size=shape[1:] or None)


def test_another_convolution_is_refused() -> None:
    unpadded = type("Own", (nn.Conv2d,), {"forward": lambda m, x: F.conv2d(x, m.weight, m.bias)})
    with torch.device("meta"):
        layer = unpadded(2, 4, 3, padding=1)
    with pytest.raises(ValueError, match="another convolution than that of its class"):
        sn_fast.spectral_norm(layer, input_size=(6, 6))


def test_a_lookup_of_its_own_is_refused() -> None:
    own = type("Own", (nn.Embedding,), {"forward": lambda m, x: F.embedding(x, m.weight)})
    sn_fast.spectral_norm(own(5, 3))
    with pytest.raises(ValueError, match="meta device, without values to look up"):
        sn_fast.spectral_norm(own(5, 3, device="meta"))


def test_a_refusal_does_not_promise_a_measurement() -> None:
    """Only maps that operator_of takes are said to be measurable."""
    rectified = type("Own", (nn.Linear,), {"forward": lambda m, x: F.relu(F.linear(x, m.weight, m.bias))})
    doubled = type("Own", (nn.Linear,), {"forward": lambda m, x: F.linear(2 * x, m.weight, m.bias)})
    for cls, measurable in ((rectified, False), (doubled, True)):
        layer = cls(4, 3)
        with pytest.raises(ValueError, match="cannot be normalised") as caught:
            sn_fast.spectral_norm(layer)
        assert ("can be measured" in str(caught.value)) == measurable
        if measurable:
            assert float(sn_fast.operator_norm(sn_fast.operator_of(layer))) == pytest.approx(
                norm_of(layer, 4), rel=1e-4
            )
            continue
        with pytest.raises(ValueError, match="relu"):
            sn_fast.operator_of(layer)
