"""Whole models with kernels: what is freed, and that training is what it is without kernels."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sn_fast import apply_spectral_norm, update_spectral_norm
from sn_fast.normalization import prepared, refresh

from ..normalization.models import X, states
from .whole_models import agree, assert_close, interrupt, layers, normalised, plain_pytorch

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("interrupted", [False, True])
def test_replaced_layers_and_models_are_freed(interrupted: bool) -> None:
    model = normalised()
    model(X).sum().backward()
    update_spectral_norm(model)  # the step that is found for the first layer is kept
    if interrupted:
        interrupt(model)
    first, parameter = weakref.ref(model[0]), weakref.ref(layers(model)[0].raw)
    gc.collect()
    steps = len(prepared._steps)
    model[0] = nn.Conv2d(2, 6, 3, stride=2, padding=1)
    gc.collect()
    assert first() is None
    assert parameter() is None
    assert len(prepared._steps) == steps - 1
    agree(model)
    if interrupted:
        model[2].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(X)
    references = [weakref.ref(m) for m in layers(model)]
    del model
    gc.collect()
    assert not any(r() for r in references)


def test_a_parameter_that_was_replaced_is_freed_by_the_next_forward() -> None:
    model = normalised()
    model(X)
    before = weakref.ref(layers(model)[0].raw)
    model[0].parametrizations.weight.original = nn.Parameter(torch.randn(6, 2, 3, 3))
    model(X)
    gc.collect()
    assert before() is None


def test_a_forward_frees_its_weights() -> None:
    """Outside autograd each is freed as soon as its layer has run, and none is there twice."""
    model = normalised()
    alive: list[weakref.ref[Tensor]] = []
    real = refresh.normalize_all

    def watched(*args: Any) -> list[Tensor]:
        values = real(*args)
        alive.extend(map(weakref.ref, values))
        return values

    counts = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(refresh, "normalize_all", watched)
        hooks = [
            m.module.register_forward_hook(lambda *_: counts.append(sum(r() is not None for r in alive)))
            for m in layers(model)
        ]
        model(X)
        for hook in hooks:
            hook.remove()
    assert len(alive) == 4
    assert counts == [3, 2, 1, 0]


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ELU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4),
        nn.ELU(),
        nn.Conv2d(12, 70, 1),
        nn.ELU(),
        nn.ConvTranspose2d(70, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 64, 5),
    )


@pytest.mark.parametrize("how", ["plain", "momentum", "fused", "hook", "adam_fused", "bfloat16"])
def test_training_equals_that_without_kernels(how: str) -> None:
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model = apply_spectral_norm(conv_net(), torch.randn(1, 2, 8, 8), beta=0.6).to(dtype)
    data = [(torch.randn(16, 2, 8, 8).to(dtype), torch.randint(5, (16,))) for _ in range(5)]
    results = []
    for context in (contextlib.nullcontext, plain_pytorch):
        twin = copy.deepcopy(model)
        optimizer: torch.optim.Optimizer
        if how == "adam_fused":
            optimizer = torch.optim.Adam(twin.parameters(), 1e-3, eps=1e-3, fused=True)
        else:
            momentum = 0.9 if how == "momentum" else 0.0
            optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=momentum, fused=how == "fused")
        if how == "hook":
            optimizer.register_step_post_hook(lambda *_, twin=twin: update_spectral_norm(twin))
        losses = []
        with context():
            for x, y in data:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(twin(x).float(), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            out = twin(data[0][0]).detach().float()
        results.append([torch.stack(losses), out, *(p.detach().float() for p in twin.parameters()), *states(twin)])
    names = [n for n, _ in model.named_parameters()]
    assert len(results[0]) > len(names)
    floats = [[t for t in r if t.is_floating_point()] for r in results]
    assert_close(*floats, tolerance=0.02 if how == "bfloat16" else 1e-4)
