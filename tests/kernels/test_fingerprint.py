"""The kernel that hashes weights: the reference's numbers for every dtype, layout and size; and the refresh by it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.layers import LayerOperator
from sn_fast.normalization import on_device, optimizer_steps
from sn_fast.ops import fingerprint as module
from sn_fast.ops import records
from sn_fast.ops.fingerprint import fingerprint
from sn_fast.ops.prepared_step import PreparedStep

from .whole_models import every_kind, layers, plain_pytorch, same_gradients

X = torch.randn(2, 2, 7, 7, generator=torch.Generator().manual_seed(1))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHAPES = [(1,), (7,), (3, 5), (8193,), (4, 3, 3, 3), (130, 70, 3), (16, 8, 3, 3), (5, 4, 2, 3, 3), (1, 1), (2, 30000)]


def laid_out(t: Tensor, order: int) -> Tensor:
    """The same tensor in another memory format: axes in a drawn order, or a slice of a larger one."""
    if order == 0:
        return t
    if order == 1:
        large = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype, device=t.device)
        large[..., 1::2] = t
        return large[..., 1::2]
    axes = torch.randperm(t.dim(), generator=torch.Generator().manual_seed(order)).tolist()
    back = sorted(range(t.dim()), key=axes.__getitem__)
    return t.permute(axes).contiguous().permute(back)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_hash_is_the_reference_s(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    wanted = module._fingerprint(weight)
    for order in range(5):
        assert torch.equal(fingerprint(laid_out(weight, order)), wanted)


@pytest.mark.usefixtures("ordered_kernels")
def test_the_hash_in_every_thread_order() -> None:
    for shape in SHAPES:
        weight = torch.randn(shape)
        assert torch.equal(fingerprint(weight), module._fingerprint(weight))


@pytest.mark.usefixtures("kernels")
@hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=5), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99)
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_drawn_weights(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weight = laid_out(torch.randn(shape).to(dtype), 2 + seed)
    assert torch.equal(fingerprint(weight), module._fingerprint(weight))


@pytest.mark.usefixtures("kernels")
def test_an_address_that_is_not_aligned() -> None:
    for dtype in DTYPES:
        large = torch.randn(9001).to(dtype)
        for first in range(1, 5):
            assert torch.equal(fingerprint(large[first:]), module._fingerprint(large[first:].clone()))


def test_sampled_places_are_the_reference_s() -> None:
    for numel in (1, 5, 1023, 1024, 1025, 5000, 123457):
        assert torch.equal(module._sample(torch.arange(numel)), torch.as_tensor(records.sampled(numel)))
        assert records.length_of(numel) == 1 + len(records.sampled(numel))


# -- the refresh that it predicates -----------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch, kernels: Any) -> Iterator[list[list[int]]]:
    """Devices compare, the CPU too; what they found, call by call."""
    found: list[list[int]] = []
    refresh = PreparedStep.refresh

    def recorded(step: PreparedStep, *args: Any, **options: Any) -> Any:
        result = refresh(step, *args, **options)
        found.append(result.changes.tolist())
        return result

    monkeypatch.setattr(records, "_HOSTS", frozenset())
    monkeypatch.setattr(PreparedStep, "refresh", recorded)
    yield found
    hook, optimizer_steps._Steps.hook = optimizer_steps._Steps.hook, None
    if hook is not None:
        hook.remove()


def model_of(**options: Any) -> nn.Sequential:
    with plain_pytorch():  # the start is not what is tested
        return sn_fast.apply_spectral_norm(every_kind(), torch.randn(1, 2, 7, 7), **options)


def states(model: nn.Module) -> list[Tensor]:
    return [
        b.clone() for m in layers(model) for n in ("u", "v", "sigma", "top_group") if (b := m.buffer(n)) is not None
    ]


def nudge(model: nn.Module, which: list[int]) -> None:
    for i in which:
        raw = layers(model)[i].raw.data
        raw += 0.02 * raw.norm() / raw.numel() ** 0.5 * torch.randn_like(raw)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_only_what_has_changed_moves_and_as_by_the_reference(compared: list[list[int]], n: int, grad: bool) -> None:
    model, x = model_of(n_power_iterations=n), torch.randn(2, 2, 7, 7)
    with torch.set_grad_enabled(grad):
        model(x)
        for which in ([], [0], [2, 4], [0, 1, 2, 3, 4]):
            twin = copy.deepcopy(model)
            nudge(model, which)
            for a, b in zip(layers(twin), layers(model)):
                a.raw.data.copy_(b.raw.data)
            before = states(model)
            compared.clear()
            out = model(x)
            assert compared == [[int(i in which) for i in range(5)] + [len(which)]]
            with plain_pytorch():
                wanted = twin(x)
            torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-6)
            for a, b in zip(states(model), states(twin)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
            assert [torch.equal(a, b) for a, b in zip(before, states(model))].count(False) >= 3 * len(which)
            compared.clear()
            model(x)
            assert compared == [[0] * 6]
            assert all(map(torch.equal, states(model), states(model)))


def test_a_graph_keeps_the_state_of_its_own_forward(compared: list[list[int]]) -> None:
    model, x = model_of(beta=0.1), torch.randn(2, 2, 7, 7)
    nudge(model, [0, 3])
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    loss = model(x).square().sum()
    sn_fast.update_spectral_norm(model, 2)
    assert same_gradients(list(torch.autograd.grad(loss, list(model.parameters()))), list(wanted))


def others(model: nn.Module) -> None:
    """Other weights, three times as large; through .data, so that the host sees nothing."""
    for m in layers(model):
        drawn = torch.randn_like(m.raw)
        m.raw.data.copy_(3 * m.raw.norm() / drawn.norm() * drawn)


def known(model: nn.Module) -> list[float]:
    return [float(m.sigma) for m in layers(model)]


@torch.no_grad()
def exact(model: nn.Module) -> list[float]:
    operators = [LayerOperator(m.operand(m.raw).double(), m.known_geometry) for m in layers(model)]
    return [float(torch.linalg.matrix_norm(operator.to_dense(), 2)) for operator in operators]


@torch.no_grad()
def in_place(model: nn.Module) -> None:
    for m in layers(model):
        nn.init.orthogonal_(m.raw)
        m.raw.mul_(3)


def assigned(model: nn.Module) -> None:
    for m in layers(model):
        m.siblings.original = nn.Parameter(3 * torch.randn_like(m.raw))


def new_data(model: nn.Module) -> None:
    for m in layers(model):
        m.raw.data = 3 * torch.randn_like(m.raw)


@pytest.mark.parametrize("change", [in_place, assigned, new_data], ids=lambda f: f.__name__)
def test_another_weight_that_the_host_sees_starts_anew(compared: list[list[int]], change: Any) -> None:
    model = model_of()
    model(X)
    change(model)
    model(X)
    assert known(model) == pytest.approx(exact(model), rel=0.03)


def test_another_weight_that_only_the_device_sees_starts_anew_one_forward_later(compared: list[list[int]]) -> None:
    model = model_of()
    model(X)
    others(model)
    model(X)
    assert compared[-1] == [2] * 5 + [5]
    assert known(model) != pytest.approx(exact(model), rel=0.03)  # followed, so far
    model(X)
    assert known(model) == pytest.approx(exact(model), rel=0.03)
    compared.clear()
    model(X)
    assert compared == [[0] * 6]


@pytest.mark.parametrize("ask", [sn_fast.sigmas, copy.deepcopy, nn.Module.state_dict], ids=lambda f: f.__name__)
def test_calls_outside_a_forward_wait_for_the_device(compared: list[list[int]], ask: Any) -> None:
    model = model_of()
    model(X)
    others(model)
    ask(model)
    assert known(model) == pytest.approx(exact(model), rel=0.03)


def test_a_training_step_is_followed_without_waiting(
    compared: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a large one: only what no optimizer wrote makes the host wait."""
    model = model_of()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    waits: list[int] = []
    real = on_device.replaced_now
    monkeypatch.setattr(on_device, "replaced_now", lambda *args: waits.append(1) or real(*args))
    for _ in range(3):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert compared[1:] == [[1] * 5 + [5]] * 2
    model(X)
    assert not waits
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.001 * torch.randn_like(p))
    model(X)
    assert waits


def test_an_update_moves_what_has_not_changed(compared: list[list[int]]) -> None:
    model = model_of()
    before = states(model)
    sn_fast.update_spectral_norm(model, 4)
    assert compared == [[1] * 5 + [5]]
    assert not all(map(torch.equal, states(model), before))
    compared.clear()
    model(X)
    assert compared == [[0] * 6]


def test_a_bound_is_proven_where_the_weight_has_changed(compared: list[list[int]]) -> None:
    model = model_of(bound=True)
    model(X)
    nudge(model, [0, 1, 2, 3, 4])
    model(X)
    for m, norm in zip(layers(model), exact(model)):
        assert norm * (1 - 1e-6) <= float(m.sigma) <= 1.5 * norm
        assert float(m.estimate) <= float(m.sigma)


def test_more_layers_than_one_call_takes(compared: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_device, "_MOST", 2)
    model = model_of()
    model(X)
    nudge(model, [0, 3])
    compared.clear()
    model(X)
    assert compared == [[1, 0, 1], [0, 1, 1], [0, 0]]


def test_compiled_code_refreshes_by_the_same_kernels(compared: list[list[int]]) -> None:
    """Through the operator, which keeps its prepared steps by address."""
    model = model_of()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(X)
        compared.clear()
        compiled(X)
        assert compared
        assert not any(map(any, compared))
        nudge(model, [1])
        compared.clear()
        compiled(X)
    assert sum(c[-1] for c in compared) == 1
    assert known(model) == pytest.approx(exact(model), rel=0.05)


def test_an_alarm_raised_after_those_that_were_read_is_kept(
    compared: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the host reads is a copy from before: other layers' alarms since then wait for the next reading."""
    model = model_of()
    model(X)
    real = on_device._arrived
    monkeypatch.setattr(on_device, "_arrived", lambda step: [1, *[0] * 4] if any(real(step)) else [0] * 5)
    others(model)
    model(X)
    model(X)  # of five, one is read
    monkeypatch.setattr(on_device, "_arrived", real)
    model(X)
    assert known(model) == pytest.approx(exact(model), rel=0.03)


def test_gradients_are_those_of_the_copied_vectors(compared: list[list[int]]) -> None:
    """By the reference from the same state; of layers that have changed in this forward, and of others."""
    model = model_of(beta=0.1)
    model(X)
    nudge(model, [1, 3])
    found = list(torch.autograd.grad(model(X).square().sum(), list(model.parameters())))
    with plain_pytorch():
        twin = copy.deepcopy(model)
        wanted = list(torch.autograd.grad(twin(X).square().sum(), list(twin.parameters())))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(max(g.abs().max() for g in wanted)))
