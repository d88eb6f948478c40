"""SpectralProjection.attach: a call after each step, whatever the optimizer is, with its arguments and result."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sn_fast import SpectralProjection

X, Y = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(9 * model(X), Y)


def norms(model: nn.Sequential) -> list[float]:
    return [float(torch.linalg.matrix_norm(model[i].weight.detach(), 2)) for i in (0, 2)]


def is_within(model: nn.Sequential, beta: float) -> list[bool]:
    return [norm <= beta * 1.02 for norm in norms(model)]


class Plain:
    """An optimizer that knows nothing of torch.optim."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = list(parameters)

    def step(self, factor: float = 1.0) -> str:
        with torch.no_grad():
            for p in self.parameters:
                p -= factor * p.grad
        return "done"


class WithoutConstructor(torch.optim.SGD):
    """As wrappers of accelerate: a subclass that calls no constructor, with the optimizer inside."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class OwnStep(torch.optim.Optimizer):
    """A subclass whose step calls no other."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> str:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-1.0)
        return "own"


def patched(parameters: Any) -> torch.optim.Optimizer:
    """One whose class got another step after it was made, as some libraries do: PyTorch's hooks do not run there."""

    class Patched(torch.optim.SGD):
        pass

    def step(self: torch.optim.Optimizer, closure: Any = None) -> None:
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p -= p.grad

    optimizer = Patched(parameters, 1.0)
    Patched.step = step  # type: ignore[assignment,method-assign]
    return optimizer


MADE = {
    "patched class": lambda m: patched(m.parameters()),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), 1.0),
    "fused Adam": lambda m: torch.optim.Adam(m.parameters(), 0.5, fused=True),
    "foreach AdamW": lambda m: torch.optim.AdamW(m.parameters(), 0.5, foreach=True),
    "Adafactor": lambda m: torch.optim.Adafactor(m.parameters(), 0.5),
    "own step": lambda m: OwnStep(m.parameters()),
    "no constructor": lambda m: WithoutConstructor(torch.optim.SGD(m.parameters(), 1.0)),
    "no torch.optim": lambda m: Plain(m.parameters()),
}


@pytest.mark.parametrize("kind", MADE)
def test_every_optimizer_is_followed(kind: str) -> None:
    model = network()
    projection = SpectralProjection(model, X[:1], beta=0.5, tol=1e-4)
    optimizer = MADE[kind](model)
    handle = projection.attach(optimizer)
    for _ in range(3):
        model.zero_grad()
        loss_of(model).backward()
        result = optimizer.step()
        assert all(is_within(model, 0.5))
    assert result == {"own step": "own", "no torch.optim": "done"}.get(kind)
    handle.remove()
    model.zero_grad()
    loss_of(model).backward()
    optimizer.step()
    with torch.no_grad():
        model[0].weight += 1
    optimizer.step()
    assert not is_within(model, 0.5)[0]


@pytest.mark.parametrize("kind", [kind for kind in MADE if kind != "no constructor"])  # which PyTorch cannot copy
def test_a_copy_steps_itself(kind: str) -> None:
    model = network()
    projection = SpectralProjection(model, X[:1], beta=0.5)
    optimizer = MADE[kind](model)
    projection.attach(optimizer)
    other, its_optimizer = copy.deepcopy((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(other).backward()
    its_optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(map(torch.equal, before, other.parameters()))


def test_a_schedulers_step_is_followed() -> None:
    for first in (True, False):
        model = network()
        projection = SpectralProjection(model, X[:1], beta=0.5, tol=1e-4)
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        if first:
            torch.optim.lr_scheduler.LinearLR(optimizer)
        projection.attach(optimizer)
        if not first:
            torch.optim.lr_scheduler.LinearLR(optimizer)
        loss_of(model).backward()
        optimizer.step()
        assert all(is_within(model, 0.5))


def test_a_closures_value_is_returned() -> None:
    model = network()
    projection = SpectralProjection(model, X[:1], beta=0.5, tol=1e-4)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")
    projection.attach(optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    before = float(loss_of(model))
    assert float(optimizer.step(closure)) == before
    assert all(is_within(model, 0.5))


def test_each_optimizer_has_its_own_weights() -> None:
    model = network()
    projection = SpectralProjection(model, X[:1], beta=0.5, tol=1e-4)
    first, second = (torch.optim.SGD(model[i].parameters(), 1.0) for i in (0, 2))
    projection.attach(first)
    projection.attach(second)
    loss_of(model).backward()
    with torch.no_grad():
        model[2].weight += 1
    first.step()
    assert is_within(model, 0.5) == [True, False]
    second.step()
    assert is_within(model, 0.5)[1]


def test_a_step_that_is_left_out_changes_nothing() -> None:
    model = network()
    projection = SpectralProjection(model, X[:1], beta=0.5, tol=1e-4)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    projection.attach(optimizer)
    scaler = torch.amp.GradScaler(X.device.type, init_scale=1.0)
    for bad in (True, False):
        state = copy.deepcopy([list(model.parameters()), projection.state_dict()])
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if bad:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        same = torch.equal(state[0][0], model[0].weight) and torch.equal(
            state[1]["0.v"], projection.state_dict()["0.v"]
        )
        assert same == bad


def test_an_optimizer_of_other_weights_is_refused() -> None:
    projection = SpectralProjection(network(), X[:1])
    with pytest.raises(ValueError, match="SGD trains none of the 2 projected weights; make it from the parameters"):
        projection.attach(torch.optim.SGD(network().parameters(), 1.0))
    with pytest.raises(TypeError, match="optimizer is a Linear without a method step"):
        projection.attach(nn.Linear(1, 1))
