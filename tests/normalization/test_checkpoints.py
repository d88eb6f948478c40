"""Copies, checkpoints and resumed training: the state goes with the weight it belongs to."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import sn_fast
from sn_fast import apply_spectral_norm, sigmas

from .models import X, network, normalised, states, step, true_norms, unchanged


def test_deepcopy_is_independent_and_no_change() -> None:
    model = normalised()
    model(X)
    before = states(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    assert unchanged(twin, before)
    step(twin, X, torch.optim.SGD(twin.parameters(), 0.5))
    twin(X)
    assert unchanged(model, before)
    assert not unchanged(twin, before)


def test_deepcopy_sees_a_change_made_before_its_first_use() -> None:
    """The usual EMA: copy, update the copy in place, and only then use it."""
    twin = copy.deepcopy(normalised(beta=0.3))
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2.0)
    twin.eval()(X)
    assert true_norms(twin, raw=False) == pytest.approx([0.3] * 4, rel=5e-3)


def test_deepcopy_of_one_layer_does_not_drag_the_model_along() -> None:
    model = normalised()
    reached: dict[int, object] = {}
    layer = copy.deepcopy(model[0], reached)
    others = [p for m in list(model)[1:] for p in m.parameters()]
    assert not any(id(p) in reached for p in others)
    assert layer.parametrizations.weight[0].module is layer


def test_state_dict_round_trip_is_strict_and_no_change() -> None:
    model, twin = normalised(), normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.1))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert unchanged(twin, states(model))
    assert torch.equal(twin(X), model(X))
    assert unchanged(twin, states(model))


def test_saving_takes_a_pending_change_along() -> None:
    """Saved right after a step, before the next forward: sigma in the file belongs to the weight in the file."""
    model = normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.5))
    state = model.state_dict()
    assert state["0.parametrizations.weight.0.sigma"].item() == sigmas(model)["0"]
    before = states(model)
    model(X)
    assert unchanged(model, before)


@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_resume_is_bit_identical(gradient: str) -> None:
    def train(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            x = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(seed))
            step(model, x, optimizer)

    model = normalised(gradient=gradient)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(4, 8))
    resumed = normalised(gradient=gradient)
    optimizer = torch.optim.SGD(resumed.parameters(), 0.1, momentum=0.9)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(resumed, optimizer, range(4, 8))
    never_saved = torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9)
    train(twin, never_saved, range(8))
    for other in (resumed, twin):
        for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
            assert torch.equal(a, b), name


def test_a_layer_without_known_size_loads_a_checkpoint_before_its_first_forward() -> None:
    def lazy() -> nn.Sequential:
        model = network()
        for module in model:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                sn_fast.spectral_norm(module, beta=0.5)
        return model

    trained = lazy()
    trained(X)
    fresh = lazy()
    fresh.load_state_dict(trained.state_dict(), strict=True)
    assert unchanged(fresh, states(trained))
    assert torch.equal(fresh(X), trained(X))
    assert unchanged(fresh, states(trained))
    untouched = lazy()
    untouched.load_state_dict(lazy().state_dict(), strict=True)
    untouched(X)


def test_plain_weights_loaded_without_vectors_get_a_fresh_start() -> None:
    model, other = normalised(beta=0.3), normalised(beta=0.3)
    step(other, X, torch.optim.SGD(other.parameters(), 1.0))
    weights = {k: v for k, v in other.state_dict().items() if not k.endswith((".u", ".v", ".sigma", ".top_group"))}
    model.load_state_dict(weights, strict=False)
    assert list(sigmas(model).values()) == pytest.approx(true_norms(model, raw=True), rel=5e-3)


def test_a_torch_spectral_norm_checkpoint_loads() -> None:
    theirs = network()
    for module in theirs:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            torch.nn.utils.parametrizations.spectral_norm(module)
    for _ in range(200):
        theirs(X)
    theirs.eval()
    # The reshaped operator is theirs: the same function.
    ours = apply_spectral_norm(network(), X[:1], operator="reshape", mode="scale")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours.eval()(X), theirs(X), rtol=1e-4, atol=1e-6)
    p, q = ours[0].parametrizations.weight[0], theirs[0].parametrizations.weight[0]
    torch.testing.assert_close(p.u, q._u, rtol=0, atol=1e-4)
    torch.testing.assert_close(p.v, q._v, rtol=0, atol=1e-4)
    # The true operator: weights load, vectors start afresh, also where the size is not known yet.
    for true in (normalised(beta=0.3), sn_fast.spectral_norm(nn.Conv2d(2, 6, 3, stride=2, padding=1), beta=0.3)):
        state = theirs.state_dict() if isinstance(true, nn.Sequential) else theirs[0].state_dict()
        true.load_state_dict(state, strict=True)
        true(X)
        assert true_norms(true, raw=False)[0] == pytest.approx(0.3, rel=5e-3)


def test_torch_save_of_a_whole_module_says_to_save_state_dict() -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        torch.save(normalised(), io.BytesIO())
