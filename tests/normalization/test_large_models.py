"""Models whose weights are hashed, not kept twice, follow them just as well."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sn_fast import apply_spectral_norm
from sn_fast.normalization import registration

from ..on_device import DEVICE
from .models import X, network, normalised, states, step, true_norms, unchanged


@pytest.fixture(autouse=True)
def _hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registration, "_LARGEST_COPIES", 0)


def records(model: nn.Module) -> list[torch.Tensor]:
    return [m.parametrizations.weight[0].record for m in model if hasattr(m, "parametrizations")]


def test_no_weight_is_kept_twice() -> None:
    model = normalised()
    assert all(r.dtype == torch.int64 and r.ndim == 1 for r in records(model))
    moved = copy.deepcopy(model).double()
    assert all(r.dtype == torch.int64 for r in records(moved))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about the host's two kinds of records")
def test_training_is_that_of_a_model_with_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = apply_spectral_norm(network(), X[:1], beta=0.7)
    monkeypatch.undo()
    kept = apply_spectral_norm(copy.deepcopy(network()), X[:1], beta=0.7)
    kept.load_state_dict(hashed.state_dict())
    for model in (hashed, kept):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(4):
            step(model, X, optimizer)
        model(X)
    assert records(kept)[0].is_floating_point()
    assert unchanged(hashed, states(kept))


@pytest.mark.parametrize(
    "write",
    [
        lambda p: p.data.mul_(2.0),
        lambda p: p.data.copy_(torch.randn_like(p)),
        lambda p: p.data.view(-1)[0].add_(1.0),
        lambda p: p.data.copy_(p.data.flatten().flip(0).view_as(p).clone()),
    ],
    ids=["scaled", "replaced", "one element", "reversed"],
)
def test_a_write_is_noticed_once(write: Callable[[nn.Parameter], object]) -> None:
    model = normalised(beta=0.3)
    model(X)
    for m in model:
        if hasattr(m, "parametrizations"):
            write(m.parametrizations.weight.original)
    before = states(model)
    model(X)
    after = states(model)
    assert not unchanged(model, before)
    assert true_norms(model, raw=False) == pytest.approx([0.3] * 4, rel=0.06)
    model.eval()(X)
    assert unchanged(model, after)


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(memory_format=torch.channels_last)])
def test_a_move_is_no_change(move: Callable[[nn.Module], nn.Module]) -> None:
    model = normalised()
    before = states(model)
    move(model)
    model(X.to(next(model.parameters()).dtype))
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(before, states(model), strict=True))
