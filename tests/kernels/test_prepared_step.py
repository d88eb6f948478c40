"""Refresh in place: the same bits as the operator's, for as long as the tensors stay where they are."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.normalization import prepared, refresh
from sn_fast.ops.prepared_step import PreparedStep

from ..attacks.models import same_bits
from ..normalization.models import Operators
from .whole_models import every_kind, layers, move_in_place, plain_pytorch, same_gradients

pytestmark = pytest.mark.usefixtures("kernels")

STATES = ("u", "v", "sigma", "top_group")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of iterations that were taken in place."""
    found: list[int] = []
    run, refresh = PreparedStep.run, PreparedStep.refresh

    def recorded(step: PreparedStep, n_iterations: int) -> None:
        found.append(n_iterations)
        run(step, n_iterations)

    def compared(step: PreparedStep, n_iterations: int, *args: Any, **options: Any) -> Any:  # on devices alone
        result = refresh(step, n_iterations, *args, **options)
        if result.changes[-1]:
            found.append(n_iterations)
        return result

    monkeypatch.setattr(PreparedStep, "run", recorded)
    monkeypatch.setattr(PreparedStep, "refresh", compared)
    return found


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One element for every step that was prepared."""
    found: list[int] = []
    prepare = prepared.prepare
    monkeypatch.setattr(prepared, "prepare", lambda *args: found.append(1) or prepare(*args))
    return found


def network(**options: Any) -> nn.Sequential:
    with plain_pytorch():  # the start is not what is tested
        return sn_fast.apply_spectral_norm(every_kind(), torch.randn(1, 2, 7, 7), **options)


def state(model: nn.Module) -> list[Tensor]:
    return [b.clone() for m in layers(model) for name in STATES if (b := m.buffer(name)) is not None]


def by_operator(model: nn.Module, n: int | None = None) -> None:
    """The same refresh, by the operator: a dispatch mode has to see it."""
    with Operators() as operators:
        sn_fast.update_spectral_norm(model, n)
    assert operators.seen.count("sn_fast::power_step") == 1


def agree(model: nn.Module, runs: list[int], n: int | None = None, in_place: bool = True) -> None:
    twin = copy.deepcopy(model)  # refreshes the model, if it is stale
    by_operator(twin, n)
    runs.clear()
    sn_fast.update_spectral_norm(model, n)
    assert runs == [n or 1] * in_place
    assert all(map(same_bits, state(model), state(twin)))


@pytest.mark.parametrize("operator", ["conv", "reshape"])
def test_equals_the_operator(runs: list[int], operator: str) -> None:
    model = network(operator=operator)
    for n in (None, 2, 3):
        move_in_place(model)
        # A reshaped transposed convolution is a copy of its weight, so that there the operator is used.
        agree(model, runs, n, in_place=operator == "conv")


def test_a_matrix_that_is_a_view_of_its_weight(runs: list[int]) -> None:
    model = network(operator="reshape", exclude="1")
    for _ in range(2):
        move_in_place(model)
        agree(model, runs)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-30])
def test_weights_without_a_norm_keep_their_vectors(runs: list[int], value: float) -> None:
    model = network()
    for i in (0, 2, 5):
        model[i].parametrizations.weight.original.data.fill_(value)
    agree(model, runs)


def test_what_is_found_once_is_used_again_and_again(runs: list[int], made: list[int]) -> None:
    model = network()
    for _ in range(4):
        for p in model.parameters():
            p.data.add_(0.003 * torch.randn_like(p))
        sn_fast.update_spectral_norm(model)
    assert (len(runs), len(made)) == (4, 1)


def _other_memory(model: nn.Sequential) -> Tensor:
    weight = model[0].parametrizations.weight.original
    before = weight.data
    weight.data = 1.5 * before
    return before  # kept: else its memory, and with luck its values, would be the copy's


def _other_strides(model: nn.Sequential) -> None:
    weight = model[0].parametrizations.weight.original
    weight.data = weight.data.transpose(2, 3)  # in the same place


def _other(name: str, layer: int) -> Callable[[nn.Sequential], Tensor]:
    """Another tensor for one buffer, of equal value; the old one is kept, so that its memory is not reused."""

    def change(model: nn.Sequential) -> Tensor:
        parametrization = model[layer].parametrizations.weight[0]
        before = parametrization._buffers[name]
        setattr(parametrization, name, before.clone())
        return before

    return change


def _narrow_group(model: nn.Sequential) -> None:
    """As load_state_dict(assign=True) may leave it: eight bytes would not fit."""
    parametrization = model[2].parametrizations.weight[0]
    parametrization.top_group = parametrization.top_group.int()


def _another_layer(model: nn.Sequential) -> None:
    sn_fast.remove_spectral_norm(model[3])


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "memory of a weight": _other_memory,
    "strides of a weight": _other_strides,
    "u": _other("u", 0),
    "v": _other("v", 0),
    "sigma": _other("sigma", 0),
    "top_group": _other("top_group", 2),
    "dtype of top_group": _narrow_group,
    "layers": _another_layer,
    "dtype": lambda model: model.to(torch.bfloat16),
    "layout": lambda model: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_it_is_for(runs: list[int], name: str) -> None:
    model = network()
    sn_fast.update_spectral_norm(model)
    kept = CHANGES[name](model)
    for _ in range(2):
        agree(model, runs, in_place=name not in ("strides of a weight", "dtype of top_group"))
    del kept


def test_weights_that_were_all_replaced(runs: list[int]) -> None:
    """Unlike above, where the copy for the comparison has those refreshed alone that have changed."""
    model = network()
    sn_fast.update_spectral_norm(model)
    before = [m.sigma.clone() for m in layers(model)]
    kept = [m.raw.data for m in layers(model)]
    for m in layers(model):
        m.raw.data = 2 * m.raw.data
    sn_fast.update_spectral_norm(model, 3)
    assert runs == [1, 3]
    for m, sigma, old in zip(layers(model), before, kept, strict=True):
        torch.testing.assert_close(m.sigma, 2 * sigma, rtol=0.1, atol=0)
        assert m.raw.data_ptr() != old.data_ptr()


def test_parts_that_are_trained_in_turn(runs: list[int], made: list[int]) -> None:
    """Found once each, and no more than a few are kept."""
    model = network()
    for _ in range(3):
        sn_fast.update_spectral_norm(model)
        sn_fast.update_spectral_norm(model[:3])
        sn_fast.update_spectral_norm(model[3:])
    assert (len(runs), len(made)) == (9, 3)
    members = layers(model)
    for n in range(2, len(members) + 1):
        for last in members[1:]:
            chosen = [members[0], *[m for m in members[1:n] if m is not last], last]
            refresh.advance([(m, m.raw) for m in chosen])
    assert len(prepared._steps[members[0]]) == prepared._MOST_BATCHES


def test_float64_goes_to_the_operator(runs: list[int]) -> None:
    model = network().double()
    agree(model, runs, in_place=False)


def test_writes_are_told_to_autograd(runs: list[int]) -> None:
    """A graph that one makes of the buffers cannot be gone through any more, better than a wrong gradient."""
    model = network(beta=0.1)
    members = layers(model)
    buffers = [b for m in members for name in STATES if (b := m.buffer(name)) is not None]
    factor = torch.ones((), requires_grad=True)
    of_buffers = sum((factor * m.sigma).square() for m in members)
    before = [b._version for b in buffers]
    sn_fast.update_spectral_norm(model)
    assert [b._version for b in buffers] == [v + 1 for v in before]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        of_buffers.backward()  # type: ignore[union-attr]
    assert runs == [1]


def test_a_forward_before_it_goes_backward_with_its_own_state(runs: list[int]) -> None:
    model, x = network(beta=0.1), torch.randn(1, 2, 7, 7)
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss = model(x).square().sum()
    sn_fast.update_spectral_norm(model, 3)
    loss.backward()
    assert runs == [3]
    assert same_gradients([p.grad for p in model.parameters()], wanted)


def test_a_forward_after_a_step_takes_it(runs: list[int], made: list[int]) -> None:
    """All that have moved at once, in place, whichever way they moved."""
    model, x = network(), torch.randn(1, 2, 7, 7)
    model(x)
    for n in range(1, 4):
        for p in model.parameters():
            p.data.add_(0.003 * torch.randn_like(p))
        model(x)
        model(x)
        assert runs == [1] * n
    assert len(made) == 1
    model[0].parametrizations.weight.original.data.mul_(1.5)
    model(x)
    assert (runs, len(made)) == ([1] * 4, 2)


def test_models_are_copied_and_saved_as_before(runs: list[int]) -> None:
    model = network()
    sn_fast.update_spectral_norm(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    copy.deepcopy(model)
    assert not any(isinstance(value, PreparedStep) for m in layers(model) for value in vars(m).values())


def test_a_bound_is_certified_after_it(runs: list[int]) -> None:
    model = network(bound=True)
    move_in_place(model)
    agree(model, runs)
    for m in layers(model):
        assert m.sigma >= m.estimate


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.grad])
def test_torch_func_of_a_stale_model(runs: list[int], transform: Callable[..., Any]) -> None:
    """Inside a transform new tensors have no address: the operator is used."""
    model, x = network().requires_grad_(False), torch.randn(1, 2, 7, 7)
    move_in_place(model)
    twin = copy.deepcopy(model)
    move_in_place(model)
    for a, b in zip(layers(twin), layers(model)):
        a.raw.copy_(b.raw)
    twin(x)
    runs.clear()

    def loss(x: Tensor) -> Tensor:
        return model(x).square().sum()

    found = transform(loss)(x)
    assert runs == []
    assert all(map(same_bits, state(model), state(twin)))
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
    torch.testing.assert_close(found.reshape(x.shape), wanted, rtol=1e-4, atol=1e-5)
