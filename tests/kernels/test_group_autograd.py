"""Whole models with kernels under autograd, checkpoints, transforms of functions, compilation and threads."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sn_fast import apply_spectral_norm, update_spectral_norm
from sn_fast.normalization import snapshot as snapshot_module

from ..normalization.models import X, states, step, unchanged
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
    same_gradients,
)

pytestmark = pytest.mark.usefixtures("kernels")


class OfCheckpoints(nn.Sequential):
    """Every layer is a checkpoint of its own, within one forward."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("every_layer", [False, True])
def test_checkpoints(every_layer: bool, reentrant: bool) -> None:
    model = normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.1))
    model.zero_grad()
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    wanted, before = gradients(model), states(model)
    model.zero_grad()
    if every_layer:
        model.__class__ = OfCheckpoints
    with Calls() as calls:
        h = model(x) if every_layer else checkpoint(model, x, use_reentrant=reentrant)
        assert calls.normalize == [4]
        assert kept(model) == 0
        h.square().sum().backward()
    assert calls.normalize == ([4, 1, 1, 1, 1] if every_layer else [4, 4])  # recomputed by layer, or as a whole
    assert calls.power == 0
    assert unchanged(model, before)
    assert all(map(torch.equal, gradients(model), wanted))
    assert kept(model) == 0


def test_a_checkpoint_of_the_first_use_after_a_step() -> None:
    model = normalised()
    twin = copy.deepcopy(model)  # before the step: a copy carries no pending change
    for m in (model, twin):
        step(m, X, torch.optim.SGD(m.parameters(), 0.1))
        m.zero_grad()
    interrupt(model)
    checkpoint(model, X, use_reentrant=False).sum().backward()
    twin(X).sum().backward()
    assert unchanged(model, states(twin))
    assert same_gradients(gradients(model), gradients(twin))


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


@pytest.mark.parametrize("by", ["update", "data", "load"])
def test_a_state_that_moves_between_forward_and_backward(by: str) -> None:
    """Each graph is of the state that its forward had: nothing that it holds is written later."""
    model = normalised()
    weights = [p.detach().clone() for p in model.parameters()]
    saved = copy.deepcopy(model.state_dict())
    model(X).square().mean().backward()
    wanted = gradients(model)
    model.zero_grad()
    loss = model(X).square().mean()
    before = states(model)
    if by == "update":
        update_spectral_norm(model, 3)
    elif by == "data":
        for p in model.parameters():
            p.data = moved(p)
        model(X).sum().backward()
        model.zero_grad()
        for p, w in zip(model.parameters(), weights):
            p.data = w
    else:
        update_spectral_norm(model, 3)
        model.load_state_dict({k: v for k, v in saved.items() if not k.endswith(("original", "bias"))}, strict=False)
        for m in layers(model):
            m.sigma.mul_(3.0)
    assert not unchanged(model, before)
    loss.backward()
    assert all(map(torch.equal, gradients(model), wanted))


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


class WithGradients(nn.Sequential):
    """Computes gradients also where it is called without."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            return super().forward(x.clone())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_made_ready_without_gradients_serve_training(mode: type) -> None:
    model = normalised()
    twin = copy.deepcopy(model)
    twin(X).square().sum().backward()
    model.__class__ = WithGradients
    with mode():
        out = model(X)  # what is ready was made before the forward enabled gradients
    out.square().sum().backward()
    assert same_gradients(gradients(model), gradients(twin))
    with mode():
        out = twin(X)
    assert torch.equal(out, twin(X))
    move_in_place(twin)
    with mode():
        interrupt(twin)
        twin(X)
        move_in_place(twin)
    agree(twin).square().sum().backward()


def test_autocast() -> None:
    model = normalised()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        agree(model).float().sum().backward()
        assert model[0].weight.dtype == torch.float32
    agree(model)


def test_functional_call() -> None:
    """With tensors in the parameters' place, and with other parameters: they have a sigma of their own."""
    model = normalised()
    expected = agree(model)
    before = states(model)
    for make in (moved, lambda p: nn.Parameter(moved(p))):
        replacement = {name: make(p) for name, p in model.named_parameters()}
        found = torch.func.functional_call(model, replacement, (X,))
        with plain_pytorch():
            torch.testing.assert_close(found, torch.func.functional_call(model, replacement, (X,)))
        assert not torch.allclose(found, expected, rtol=1e-2, atol=1e-3)
        assert unchanged(model, before)
        assert kept(model) == 0
        assert torch.equal(agree(model), expected)


def test_functional_calls_with_other_tensors_one_after_the_other() -> None:
    """Tensors in the parameters' place have no address that tells them apart."""
    x = torch.randn(4, 6)
    model = apply_spectral_norm(Chosen(), x, beta=0.5)
    first, second = ({name: moved(p) for name, p in model.named_parameters()} for _ in range(2))
    torch.func.functional_call(model, first, (x, "ac"))
    found = torch.func.functional_call(model, second, (x, "bac"))
    with plain_pytorch():
        torch.testing.assert_close(found, torch.func.functional_call(model, second, (x, "bac")))


def test_transforms_of_functions_take_plain_operations() -> None:
    model = normalised()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
    with Calls() as calls:
        mapped = torch.func.vmap(model)(X[:, None])[:, 0]
        tangents = torch.func.jvp(model, (X,), (torch.ones_like(X),))[1]
    assert calls.normalize == []  # kernels have no derivatives that a transform could see
    assert kept(model) == 0
    slope = (model(X + 1e-3) - model(X - 1e-3)) / 2e-3
    torch.testing.assert_close(tangents, slope, rtol=1e-2, atol=1e-3)
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


@pytest.mark.parametrize("moves", [False, True])
def test_threads_share_a_model(moves: bool) -> None:
    """What one thread's forward has ready may go to another's, or be cleared by it: neither may be left without.

    Also where the weights have moved before: the state moves once.
    """
    model = normalised().eval()
    if moves:
        twin = copy.deepcopy(model)
        for m in (model, twin):
            torch.manual_seed(1)
            move_in_place(m)
        expected = agree(twin)
        wanted = states(twin)
    else:
        expected, wanted = agree(model), states(model)
    failures: list[BaseException] = []

    def serve(with_gradients: bool) -> None:
        try:
            for _ in range(10):
                with torch.set_grad_enabled(with_gradients):
                    out = model(X)
                assert torch.equal(out, expected)
                if with_gradients:
                    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.sum(), [*model.parameters()]))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve, args=(i % 2 == 1,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert unchanged(model, wanted)


@pytest.mark.parametrize("use", ["one_layer", "whole_model"])
def test_another_threads_use_between_the_launch_and_the_layer(use: str) -> None:
    """It takes the ready weight of a layer to come, or ends its own forward and clears what was handed out."""
    model = normalised()
    expected = agree(model)
    seen: list[Tensor] = []

    def other(*_: object) -> None:
        hook.remove()
        thread = threading.Thread(target=lambda: seen.append(model[0].weight if use == "one_layer" else model(X)))
        thread.start()
        thread.join()

    hook = model[0].register_forward_pre_hook(other)
    with Calls() as calls:
        assert torch.equal(model(X), expected)
    assert calls.normalize == ([4, 1] if use == "one_layer" else [4, 4, 1, 1, 1, 1])
    assert len(seen) == 1
    assert kept(model) == 0


@pytest.mark.skipif(DEVICE.type != "cpu", reason="makes streams up")
def test_weights_made_ready_on_another_stream_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may not be there yet, and their memory belongs to the other stream; so do the copies of u, v and sigma."""
    model = normalised()
    expected = agree(model)

    def other_stream(*_: object) -> None:
        monkeypatch.setattr(snapshot_module, "stream_of", lambda device: (7, 0))

    model[0].register_forward_hook(other_stream)
    with Calls() as calls:
        found = model(X)
    assert calls.normalize == [4, 1, 1, 1]
    assert torch.equal(found, expected)
    found.sum().backward()
    assert kept(model) == 0
    with Calls() as calls:
        model(X)
    assert calls.normalize == [4]
