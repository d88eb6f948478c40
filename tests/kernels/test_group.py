"""Whole models with kernels: all layers are normalised in one launch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from sn_fast import apply_spectral_norm

from ..normalization.models import X, network
from .whole_models import Calls, agree, assert_close, every_kind, gradients, normalised, plain_pytorch, ready

pytestmark = pytest.mark.usefixtures("kernels")


def test_one_call_per_forward_and_nothing_is_kept() -> None:
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        with Calls() as calls:
            model(X)
            assert calls.normalize == [4]
            assert ready(model) == 0
            loss = model.train()(X).square().mean()
            assert calls.normalize == [4, 4]
            optimizer.zero_grad()
            loss.backward()
            assert (calls.normalize, calls.backward) == ([4, 4], 4)
            assert ready(model) == 0
            optimizer.step()
            assert calls.power == 0
            with torch.no_grad():
                model.eval()(X)
            assert (calls.normalize, calls.power) == ([4] * 3, 1)
            assert ready(model) == 0


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


def test_without_kernels_each_layer_computes_its_own() -> None:
    """What is computed before it is needed takes memory, and there is no launch to save."""
    model = normalised()
    with Calls() as calls, plain_pytorch():
        model(X)
    assert calls.normalize == [1, 1, 1, 1]
    assert ready(model) == 0


def test_models_do_not_mix() -> None:
    first, second = normalised(), normalised(beta=0.125)
    with Calls() as calls:
        nn.Sequential(first[0], second[0])[0](X)
        second(X)
    assert calls.normalize == [4, 4]
    agree(first)
    agree(second)


def test_options_of_layers_are_their_own() -> None:
    """beta by layer; and a layer whose gradient is full takes no part."""
    model = apply_spectral_norm(network(), X[:1], beta={"^0": 0.25, "^2": 128.0, ".": 0.5})
    with Calls() as calls:
        agree(model)
    assert calls.normalize[0] == 4
    full = normalised(gradient="full")
    with Calls() as calls:
        agree(full)
    assert (calls.normalize, ready(full)) == ([], 0)


def test_torchs_own_cache_of_parametrizations() -> None:
    model = normalised()
    expected = agree(model)
    with Calls() as calls, parametrize.cached():
        for _ in range(3):
            assert torch.equal(model(X), expected)
    assert calls.normalize == [4]
    assert ready(model) == 0
