"""Whole models with kernels under autograd, checkpoints, transforms of functions, compilation and threads."""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sn_fast import apply_spectral_norm, update_spectral_norm
from sn_fast.normalization import group as groups

from ..normalization.models import X, states, step, unchanged
from ..on_device import DEVICE
from .whole_models import (
    Calls,
    Chosen,
    agree,
    assert_close,
    gradients,
    layers,
    leave_ready,
    move_in_place,
    moved,
    normalised,
    plain_pytorch,
    ready,
)

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("every_layer", [False, True])
def test_checkpoints(every_layer: bool) -> None:
    model = normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.1))
    model.zero_grad()
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    wanted, before = gradients(model), states(model)
    model.zero_grad()
    with Calls() as calls:
        if every_layer:
            h = x
            for layer in model:
                h = checkpoint(layer, h, use_reentrant=False)
        else:
            h = checkpoint(model, x, use_reentrant=False)
        assert calls.normalize == [4]
        h.square().sum().backward()
    assert sum(calls.normalize) == 8
    assert unchanged(model, before)
    assert all(map(torch.equal, gradients(model), wanted))
    model(x)
    assert ready(model) == 0


def test_a_checkpoint_of_the_first_use_after_a_step() -> None:
    model = normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.1))
    twin = copy.deepcopy(model)
    leave_ready(model)
    model.zero_grad()
    checkpoint(model, X, use_reentrant=False).sum().backward()
    twin.zero_grad()
    twin(X).sum().backward()
    assert all(map(torch.equal, gradients(model), gradients(twin)))


def test_two_forwards_then_two_backwards() -> None:
    model = normalised()
    other = torch.randn_like(X)
    wanted = []
    for x in (X, other):
        model.zero_grad()
        model(x).square().mean().backward()
        wanted.append(gradients(model))
    model.zero_grad()
    losses = [model(x).square().mean() for x in (X, other)]
    losses[1].backward(retain_graph=True)
    assert all(map(torch.equal, gradients(model), wanted[1]))
    losses[0].backward()
    assert_close(gradients(model), [a + b for a, b in zip(*wanted)], 1e-6)
    losses[1].backward()
    assert_close(gradients(model), [a + 2 * b for a, b in zip(*wanted)], 1e-6)


def test_double_backward() -> None:
    model = normalised()
    found = []
    for context in (contextlib.nullcontext, plain_pytorch):
        with context():
            x = X.clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            model.zero_grad()
            slope.square().sum().backward()
            parameters = list(model.parameters())
            penalised = torch.autograd.grad(model(X).square().sum(), parameters, create_graph=True)
            sum(p.square().sum() for p in penalised).backward()  # type: ignore[union-attr]
            found.append(gradients(model))
    assert_close(*found, tolerance=1e-5)
    model.zero_grad()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_made_ready_without_gradients_serve_training(mode: type) -> None:
    model = normalised()
    twin = copy.deepcopy(model)
    with mode():
        leave_ready(model)
    for m in (model, twin):
        m(X).square().sum().backward()
    assert all(map(torch.equal, gradients(model), gradients(twin)))
    leave_ready(model)
    with mode():
        out = model(X)
    assert torch.equal(out, model(X))
    move_in_place(model)
    with mode():
        leave_ready(model)
        move_in_place(model)
    agree(model).square().sum().backward()


def test_autocast() -> None:
    model = normalised()
    leave_ready(model)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        agree(model).float().sum().backward()
        assert model[0].weight.dtype == torch.float32
    agree(model)


def test_functional_call() -> None:
    """With tensors in the parameters' place, and with other parameters."""
    model = normalised()
    expected = agree(model)
    for make in (moved, lambda p: nn.Parameter(moved(p))):
        replacement = {name: make(p) for name, p in model.named_parameters()}
        leave_ready(model)
        found = torch.func.functional_call(model, replacement, (X,))
        with plain_pytorch():
            assert torch.equal(found, torch.func.functional_call(model, replacement, (X,)))
        assert not torch.equal(found, expected)
        agree(model)


def test_functional_calls_with_other_tensors_one_after_the_other() -> None:
    """Tensors in the parameters' place have no address that tells them apart."""
    x = torch.randn(4, 6)
    model = apply_spectral_norm(Chosen(), x, beta=0.5)
    first, second = ({name: moved(p) for name, p in model.named_parameters()} for _ in range(2))
    torch.func.functional_call(model, first, (x, "ac"))
    found = torch.func.functional_call(model, second, (x, "bac"))
    with plain_pytorch():
        assert torch.equal(found, torch.func.functional_call(model, second, (x, "bac")))


def test_transforms_of_functions_take_plain_operations() -> None:
    model = normalised()
    leave_ready(model)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
    group = layers(model)[0]._group
    waiting = group._ready
    mapped = torch.func.vmap(model)(X[:, None])[:, 0]
    assert group._ready is waiting  # nothing computed, nothing taken
    assert len(waiting) == 3
    torch.testing.assert_close(mapped, model(X), rtol=1e-5, atol=1e-6)
    for i, x in enumerate(X):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad, rtol=1e-4, atol=1e-6)
    agree(model)


def test_compiled_training_equals_eager() -> None:
    model = normalised()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses: list[list[Tensor]] = [[], []]
    for into, run, module in ((losses[0], compiled, model), (losses[1], twin, twin)):
        optimizer = torch.optim.SGD(module.parameters(), 0.2)
        for _ in range(4):
            leave_ready(module)  # compiled code does not take these
            into.append(step(run, X, optimizer))
            update_spectral_norm(module)
    torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(agree(model), agree(twin), rtol=1e-4, atol=1e-5)


def test_compiled_gradients_lie_as_the_weights() -> None:
    """Where the memory formats of weights and activations differ."""
    model = apply_spectral_norm(nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3)), X[:1], beta=0.3)
    model[1].to(memory_format=torch.channels_last)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(X.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        found.append(gradients(model))
        assert [g.stride() for g in found[-1]] == [p.stride() for p in model.parameters()]
    assert_close(*found, tolerance=1e-5)


def test_threads_share_a_model() -> None:
    """A weight that one thread has made ready may go to another: neither may be left without."""
    model = normalised().eval()
    expected = agree(model)
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    assert torch.equal(model(X), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_another_use_right_after_the_launch() -> None:
    """What another thread can do between a launch and its result: use the same layer."""
    model = normalised()
    expected = agree(model)
    member = layers(model)[0]
    taken: list[Tensor | None] = []

    class Interrupted(groups.Group):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_ready" and not taken:
                taken.append(None)
                taken[0] = self.take_normalized(member)

    member._group.__class__ = Interrupted
    assert torch.equal(model(X), expected)
    assert taken[0] is not None


@pytest.mark.skipif(DEVICE.type != "cpu", reason="makes streams up")
def test_weights_made_ready_on_another_stream_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may not be there yet, and their memory belongs to the other stream."""
    model = normalised()
    leave_ready(model)
    with Calls() as calls:
        assert model[0].weight is not None
        assert calls.normalize == []
        monkeypatch.setattr(groups, "stream_of", lambda device: (7, 0))
        assert model[2].weight is not None
        assert model[4].weight is not None
        assert calls.normalize == [4]
