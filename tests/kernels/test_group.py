"""Whole models with kernels: a forward normalises all layers in one launch, and keeps nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sn_fast import apply_spectral_norm
from sn_fast.normalization import refresh
from sn_fast.normalization.snapshot import Snapshot

from ..normalization.models import X, network
from .whole_models import (
    Calls,
    agree,
    assert_close,
    every_kind,
    gradients,
    interrupt,
    kept,
    layers,
    normalised,
    plain_pytorch,
)

pytestmark = pytest.mark.usefixtures("kernels")


def test_one_call_per_forward_and_nothing_is_kept() -> None:
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        with Calls() as calls:
            model(X)
            assert calls.normalize == [4]
            assert kept(model) == 0
            loss = model.train()(X).square().mean()
            assert calls.normalize == [4, 4]
            optimizer.zero_grad()
            loss.backward()
            assert (calls.normalize, calls.backward) == ([4, 4], 4)
            assert kept(model) == 0
            optimizer.step()
            assert calls.power == 0
            with torch.no_grad():
                model.eval()(X)
            assert (calls.normalize, calls.power) == ([4] * 3, 1)
            assert kept(model) == 0


def test_every_layer_takes_its_weight_once_and_none_is_left() -> None:
    model = normalised()
    handed: list[Snapshot] = []
    left: list[int] = []

    def look(*_: object) -> None:
        handed[:] = [m.current for m in layers(model) if m.current is not None]
        left.append(sum(len(state.ready) for state in handed))

    model.register_forward_pre_hook(look)  # after the one that makes them ready
    for m in layers(model):
        m.module.register_forward_hook(look)
    model(X)
    assert left == [4, 3, 2, 1, 0]
    assert len(handed) == 4


def test_a_layer_outside_the_models_forward_computes_its_own_alone() -> None:
    model = normalised()
    expected = [m.weight.clone() for m in model if hasattr(m, "weight")]
    with Calls() as calls:
        for i in (7, 0, 2, 4, 7):
            assert model[i].weight is not None
        assert calls.normalize == [1] * 5
        assert kept(model) == 0
        agree(model)
    assert calls.normalize[5] == 4
    assert all(map(torch.equal, [m.weight for m in model if hasattr(m, "weight")], expected))


def test_a_forward_that_fails_keeps_nothing() -> None:
    model = normalised()
    expected = agree(model)
    with Calls() as calls:
        interrupt(model)
        assert torch.equal(model(X), expected)
    assert calls.normalize == [4, 4]
    broken = torch.randn(5, 3, 8, 8)
    with pytest.raises(RuntimeError):
        model(broken)
    assert kept(model) == 0


def test_layers_of_every_kind_in_one_call() -> None:
    model = every_kind()
    for operator in ("conv", "reshape"):
        twin = apply_spectral_norm(copy.deepcopy(model), X[:1], beta=0.25, operator=operator, mode="scale")
        with Calls() as calls:
            agree(twin)
        assert calls.normalize[0] == 5
        twin(X).square().sum().backward()
        found = gradients(twin)
        twin.zero_grad()
        with plain_pytorch():
            twin(X).square().sum().backward()
        assert_close(found, gradients(twin), 1e-5)


def test_without_kernels_small_weights_are_normalised_together_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed before it is needed takes memory, and without a launch to save only small weights gain time."""
    on_host = X.device.type == "cpu"
    model = normalised()
    with Calls() as calls, plain_pytorch():
        model(X)
    assert calls.normalize == ([4] if on_host else [1, 1, 1, 1])
    assert kept(model) == 0
    monkeypatch.setattr(refresh, "_SMALL", 0)
    with Calls() as calls, plain_pytorch():
        model(X)
    assert calls.normalize == ([] if on_host else [1, 1, 1, 1])  # on the host each layer its own, past the operator
    assert kept(model) == 0


def test_models_do_not_mix() -> None:
    first, second = normalised(), normalised(beta=0.125)
    with Calls() as calls:
        nn.Sequential(first[0], second[0])[0](X)
        assert kept(second) == 0
        second(X)
    assert calls.normalize == [1, 4]
    agree(first)
    agree(second)


def test_a_model_within_a_model() -> None:
    """Its forward has one call, whatever else the other contains."""
    inner = normalised()
    outer = nn.Sequential(inner, nn.Linear(3, 3), normalised_head())
    with Calls() as calls:
        found = outer(X)
    assert calls.normalize == [4, 1]
    assert kept(outer) == 0
    with plain_pytorch():
        assert torch.equal(found, outer(X))


def normalised_head() -> nn.Sequential:
    with plain_pytorch():
        return apply_spectral_norm(nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 3), beta=0.5)


def test_options_of_layers_are_their_own() -> None:
    """beta by layer; and a layer whose gradient is full takes no part."""
    model = apply_spectral_norm(network(), X[:1], beta={"^0": 0.25, "^2": 128.0, ".": 0.5})
    with Calls() as calls:
        agree(model)
    assert calls.normalize[0] == 4
    full = normalised(gradient="full")
    with Calls() as calls:
        agree(full)
    assert (calls.normalize, kept(full)) == ([], 0)


def test_torchs_own_cache_of_parametrizations() -> None:
    model = normalised()
    expected = agree(model)
    with Calls() as calls, parametrize.cached():
        for _ in range(3):
            assert torch.equal(model(X), expected)
    assert calls.normalize == [4]
    assert kept(model) == 0


def test_torchs_own_cache_holds_some_of_the_weights() -> None:
    model = normalised()
    expected = agree(model)
    with Calls() as calls, parametrize.cached():
        first: Tensor = model[0].weight
        assert torch.equal(model(X), expected)
        assert model[0].weight is first
    assert calls.normalize == [1, 3]
