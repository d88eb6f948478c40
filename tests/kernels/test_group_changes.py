"""Whole models with kernels: whatever happens to weights and layers, none ever sees a stale weight."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sn_fast import (
    apply_spectral_norm,
    frozen_sigma,
    operator_norm,
    operator_of,
    remove_spectral_norm,
    sigmas,
    spectral_norm,
    update_spectral_norm,
)

from ..normalization.models import X, network, states, step, unchanged
from ..on_device import DEVICE
from .whole_models import (
    Calls,
    Chosen,
    agree,
    assert_close,
    gradients,
    interrupt,
    kept,
    layers,
    move_in_place,
    moved,
    normalised,
    plain_pytorch,
)

pytestmark = pytest.mark.usefixtures("kernels")


def optimizer_step(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Sequential], None]:
    return lambda model: kind(model.parameters(), lr=0.05, **options).step()  # type: ignore[call-arg]


def write_through_data(model: nn.Module) -> None:
    """No version tells."""
    for p in model.parameters():
        p.data.copy_(moved(p))


def write_one_element(model: nn.Module) -> None:
    for m in layers(model):
        m.raw.data.view(-1)[-1] += 1.0


def write_through_data_and_update(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.copy_(moved(p))
    update_spectral_norm(model)


def replace_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = moved(p)


def replace_parameters(model: nn.Module) -> None:
    for m in layers(model):
        m.module.parametrizations.weight.original = nn.Parameter(moved(m.raw))  # type: ignore[union-attr]


def assign_weights(model: nn.Module) -> None:
    for m in layers(model):
        m.module.weight = moved(m.raw)


def swap_data(model: nn.Module) -> None:
    """Every layer's weight for another's memory, of the same age."""
    others = copy.deepcopy(model)
    move_in_place(others)
    for p, q in zip(model.parameters(), others.parameters()):
        p.data, q.data = q.data, p.data


def load_others_state(model: nn.Module) -> None:
    other = normalised()
    move_in_place(other)
    model.load_state_dict(other.state_dict())


def load_by_assignment(model: nn.Module) -> None:
    other = normalised()
    move_in_place(other)
    model.load_state_dict(other.state_dict(), assign=True)


def write_sigma(model: nn.Module) -> None:
    for m in layers(model):
        m.sigma.mul_(2.0)


def replace_sigma(model: nn.Module) -> None:
    """By another, as often written."""
    for m in layers(model):
        sigma, version = m.sigma * 2.0, m.sigma._version
        while sigma._version < version:
            sigma.mul_(1.0)
        m.sigma = sigma


def step_with_a_hook(model: nn.Module) -> None:
    """The refresh comes before the next forward, which has none."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=True)
    optimizer.register_step_post_hook(lambda *_: update_spectral_norm(model))
    optimizer.step()


CHANGES: dict[str, Callable[[nn.Sequential], None]] = {
    "sgd": optimizer_step(torch.optim.SGD, foreach=False),
    "sgd_foreach": optimizer_step(torch.optim.SGD, foreach=True),
    "sgd_fused": optimizer_step(torch.optim.SGD, fused=True),
    "sgd_momentum_fused": optimizer_step(torch.optim.SGD, fused=True, momentum=0.9),
    "adam_foreach": optimizer_step(torch.optim.Adam, foreach=True),
    "adamw_fused": optimizer_step(torch.optim.AdamW, fused=True),
    "fused_with_a_hook": step_with_a_hook,
    "in_place": move_in_place,
    "data": write_through_data,
    "one_element": write_one_element,
    "data_and_update": write_through_data_and_update,
    "replaced_data": replace_data,
    "swapped_data": swap_data,
    "replaced_parameters": replace_parameters,
    "assigned_weights": assign_weights,
    "load_state_dict": load_others_state,
    "load_by_assignment": load_by_assignment,
    "sigma_written": write_sigma,
    "sigma_replaced": replace_sigma,
    "update": lambda model: update_spectral_norm(model, 3),
    "initialised": lambda model: [nn.init.normal_(m.raw) for m in layers(model)],  # type: ignore[list-item, return-value]
}
MOVES: dict[str, Callable[[nn.Sequential], Any]] = {
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "to_half_and_back": lambda model: model.half().float(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "requires_grad": lambda model: model.requires_grad_(False),
    "eval": lambda model: model.eval(),
    "copied": copy.deepcopy,
    "saved": lambda model: model.state_dict(),
    "sigmas": sigmas,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["after_a_whole_forward", "after_a_forward_that_failed"])
def test_a_change_is_seen(change: str, when: str) -> None:
    model = normalised()
    before = agree(model)
    before.square().mean().backward()
    if when == "after_a_forward_that_failed":
        interrupt(model)
    CHANGES[change](model)
    if DEVICE.type != "cpu":  # another weight that no host sees is followed by one forward, and starts anew in the next
        model(X)
        torch.accelerator.synchronize()
    with Calls() as calls:
        after = agree(model)
    assert calls.normalize[0] == 4
    assert kept(model) == 0
    if change != "update":
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-4)
    if not change.startswith("sigma"):
        for m in layers(model):
            exact = operator_norm(operator_of(m.module, m.known_geometry.input_size or None, raw=True), method="dense")
            torch.testing.assert_close(m.sigma, exact.detach(), rtol=0.1, atol=0)
    after.square().mean().backward()
    assert all(bool(g.isfinite().all()) for g in gradients(model))


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("when", ["after_a_whole_forward", "after_a_forward_that_failed"])
def test_what_is_no_change_makes_none(move: str, when: str) -> None:
    model = normalised()
    before = agree(model)
    sigma = sigmas(model)
    if when == "after_a_forward_that_failed":
        interrupt(model)
    MOVES[move](model)
    dtype = model[0].weight.dtype
    with Calls() as calls:
        after = agree(model, X.to(dtype)).float()
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.05)
    if move != "to_half_and_back":
        assert calls.power == 0
        assert sigmas(model) == sigma


def test_a_change_in_the_middle_of_a_forward() -> None:
    """Of the weight of a layer to come it is seen at once, of a layer that was used already by the next forward."""
    model = normalised()
    before = agree(model)
    hook = model[2].register_forward_hook(lambda *_: move_in_place(model[4:]))
    with Calls() as calls:
        found = model(X)
    hook.remove()
    assert calls.normalize == [4, 1, 1]  # those that were ready were of the weights before
    assert calls.power == 2 if DEVICE.type == "cpu" else calls.power >= 2  # a device follows, and then starts anew
    with plain_pytorch():
        assert torch.equal(found, model(X))
    assert not torch.allclose(found, before, rtol=1e-2, atol=1e-3)
    model = normalised()
    before = agree(model)
    hook = model[4].register_forward_hook(lambda *_: move_in_place(model[:2]))
    assert torch.equal(model(X), before)
    hook.remove()
    assert not torch.allclose(agree(model), before, rtol=1e-2, atol=1e-3)


def test_a_forward_has_one_sigma() -> None:
    """What is written into a buffer in the middle of a forward counts from the next one on."""
    model = normalised()
    before = agree(model)
    for i in (2, 7):
        hook = model[i].register_forward_pre_hook(lambda *_: write_sigma(model[4:]))
        assert torch.equal(model(X), before)
        hook.remove()
        after = agree(model)
        assert not torch.allclose(after, before, rtol=1e-2, atol=1e-3)
        before = after


def test_a_weight_transposed_in_place() -> None:
    """Its memory and version stay."""
    x = torch.randn(4, 6)
    model = apply_spectral_norm(Chosen(), x, beta=0.5)
    before = model(x, "c")
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.T
    with Calls() as calls:
        found = model(x)
    assert calls.normalize == [3]
    assert calls.power == 1 if DEVICE.type == "cpu" else calls.power >= 1
    with plain_pytorch():
        assert torch.equal(found, model(x))
    assert not torch.allclose(model(x, "c"), before, rtol=1e-2, atol=1e-3)


def test_another_weight_than_the_layers_own() -> None:
    """A parametrization called on a parameter of one's own: it has a sigma of its own, and the layer's stays."""
    model = normalised()
    expected, before = agree(model), states(model)
    member = layers(model)[-1]
    other = nn.Parameter(8.0 * moved(member.raw))
    found = member(other)
    torch.testing.assert_close(torch.linalg.matrix_norm(found, 2), torch.tensor(0.5), rtol=1e-3, atol=0)
    with plain_pytorch():
        torch.testing.assert_close(found, member(other))
    assert unchanged(model, before)
    assert torch.equal(agree(model), expected)


def test_a_layer_used_twice_or_skipped() -> None:
    x = torch.randn(4, 6)
    model = apply_spectral_norm(Chosen(), x, beta=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for names in ("abbc", "abc", "ac", "c", "abbbc", "b", "ba", "cba", "abab", "abc"):
        found = model(x, names)
        with plain_pytorch():
            assert torch.equal(found, model(x, names))
        optimizer.zero_grad()
        found.square().mean().backward()
        used = gradients(model)
        optimizer.zero_grad()
        with plain_pytorch():
            model(x, names).square().mean().backward()
        assert_close(used, gradients(model), 1e-5)
        optimizer.step()
        assert kept(model) == 0
    for names, launches in (("abc", [3]), ("abbc", [3, 1]), ("aaa", [3, 1, 1]), ("b", [3])):
        with Calls() as calls:
            model(x, names)
        assert calls.normalize == launches
        assert kept(model) == 0


def test_frozen_sigma() -> None:
    model = normalised()
    expected = agree(model)
    with Calls() as calls, frozen_sigma(model):
        for _ in range(3):
            assert torch.equal(model(X), expected)
        with frozen_sigma(model):
            model(X)
    assert calls.normalize == [4]
    with frozen_sigma(model):
        move_in_place(model)
        kept_weight = model[0].weight
        model(X)
        assert model[0].weight is kept_weight
    assert kept(model) == 0
    agree(model)
    with frozen_sigma(model[:3]):  # a part: the others are computed without it
        for p in model.parameters():
            p.data.mul_(1.2)
        with Calls() as calls:
            model(X)
        assert (calls.normalize, calls.power) == ([2], 1)
    agree(model)
    with frozen_sigma(model), contextlib.suppress(KeyError):
        raise KeyError
    agree(model)


def test_frozen_sigma_right_after_a_step_is_one_refresh_and_one_launch() -> None:
    model = normalised()
    twin = copy.deepcopy(model)
    for m in (model, twin):
        step(m, X, torch.optim.SGD(m.parameters(), 0.5))
    with Calls() as calls, frozen_sigma(model):
        frozen = model(X)
    assert (calls.normalize, calls.power) == ([4], 1)
    assert torch.equal(frozen, agree(twin))
    assert unchanged(model, states(twin))


def test_frozen_sigma_that_fails_freezes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = normalised()
    with monkeypatch.context() as patch:
        last = layers(model)[-1]
        patch.setattr(last, "normalize", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), frozen_sigma(model):
            pytest.fail("frozen")
    move_in_place(model)
    assert model[0].weight is not model[0].weight
    agree(model).sum().backward()


def test_a_copy_is_independent_also_of_a_forward_that_is_under_way() -> None:
    model = normalised()
    twins: list[nn.Module] = []
    hook = model[0].register_forward_hook(lambda *_: twins.append(copy.deepcopy(model)))
    model(X)
    hook.remove()
    (twin,) = twins
    assert isinstance(twin, nn.Sequential)
    assert (kept(model), kept(twin)) == (0, 0)
    twin[0]._forward_hooks.clear()
    move_in_place(twin)
    expected = agree(model)
    assert not torch.equal(agree(twin), expected)
    assert torch.equal(agree(model), expected)
    with Calls() as calls:
        model(X)
        twin(X)
    assert calls.normalize == [4, 4]


def test_a_saved_state_continues_bit_by_bit() -> None:
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, X, optimizer)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = normalised()
    twin.load_state_dict(torch.load(file))
    assert torch.equal(agree(twin), agree(model))
    for m in (model, twin):
        step(m, X, torch.optim.SGD(m.parameters(), 0.1))
    assert torch.equal(agree(twin), agree(model))


def test_removal_in_the_middle() -> None:
    model = normalised()
    expected = agree(model)
    remove_spectral_norm(model[2])
    torch.testing.assert_close(agree(model), expected)
    with Calls() as calls:
        model(X)
    assert calls.normalize == [3]
    remove_spectral_norm(model)
    torch.testing.assert_close(model(X), expected)


def test_layers_that_were_normalised_one_by_one() -> None:
    model = network()
    for layer, size in ((model[0], (8, 8)), (model[2], None), (model[7], None)):
        spectral_norm(layer, input_size=size, beta=0.25)
    for _ in range(2):
        with Calls() as calls:
            model(X)
        assert calls.normalize == [1, 1, 1]
    agree(model)


def test_tied_weights() -> None:
    a, b, c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
    b.weight = a.weight
    model = apply_spectral_norm(nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c), torch.randn(1, 5), beta=0.5)
    x = torch.randn(3, 5)
    with Calls() as calls:
        agree(model, x)
    assert calls.normalize[0] == 3
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(x).sum().backward()
    optimizer.step()
    agree(model, x)
    assert torch.equal(model[0].weight, model[2].weight)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def test_members_of_several_dtypes() -> None:
    """float64 among them, which the kernels leave to plain PyTorch."""
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32
    model = nn.Sequential(*(m for d in dtypes for m in (Cast(d), nn.Linear(6, 6).to(d))))
    apply_spectral_norm(model, torch.randn(1, 6), beta=0.25)
    with Calls() as calls:
        agree(model, torch.randn(4, 6)).sum().backward()
    assert calls.normalize[0] == 5
    assert [m.raw.grad.dtype for m in layers(model)] == list(dtypes)  # type: ignore[union-attr]
    model[1].bfloat16()
    model[0].dtype = torch.bfloat16
    agree(model, torch.randn(4, 6))
