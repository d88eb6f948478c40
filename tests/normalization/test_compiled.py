"""Regional compilation, changing batches, attacks: what torch.compile makes of a normalised model, and how often."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.attacks import pgd

from .models import normalised
from .test_wrappers import Counted


class Block(nn.Module):
    """Attention and two linear layers, as in a transformer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.out(nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(nn.functional.gelu(self.up(x)))


def blocks(n: int = 12, **options) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), *[Block() for _ in range(n)], nn.Linear(8, 3))
    return sn_fast.apply_spectral_norm(model, torch.randn(1, 5, 8), beta=0.8, **options)


def batch(i: int, n: int = 6) -> Tensor:
    return torch.randn(n, 5, 8, generator=torch.Generator().manual_seed(i))


def step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("by", ["apply_spectral_norm", pytest.param("spectral_norm", marks=pytest.mark.slow)])
def test_twelve_equal_blocks_are_one_graph(by: str) -> None:
    torch._dynamo.reset()
    model = blocks()
    if by == "spectral_norm":
        for m in sn_fast.remove_spectral_norm(model).modules():
            if isinstance(m, nn.Linear):
                sn_fast.spectral_norm(m, beta=0.8)
    twin, backend = copy.deepcopy(model), Counted()
    for block in model:
        if isinstance(block, Block):
            block.compile(backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, twin)]
    for i in range(4):
        losses = [step(m, batch(i), o) for m, o in zip((model, twin), optimizers)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert backend.n == 1
    for m in (model, twin):
        m.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batch(9)), twin(batch(9)), rtol=1e-5, atol=1e-6)
    assert backend.n == 2  # without gradients


@pytest.mark.parametrize("n", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_of_every_size(n: int) -> None:
    torch._dynamo.reset()
    model, backend = blocks(n), Counted()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (model, twin)]
    seen = []
    for i, size in enumerate((6, 4, 7, 3, 9, 6, 5)):
        losses = [step(m, batch(i, size), o) for m, o in zip((compiled, twin), optimizers)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        seen.append(backend.n)
    assert seen[1:] == [seen[1]] * 6  # the second size makes it a variable


@pytest.mark.parametrize("how", [pytest.param("whole", marks=pytest.mark.slow), "blocks"])
def test_attacks_on_compiled_models(how: str) -> None:
    """The attack's loop is eager; the model that it calls is compiled, once for the attack and once for training."""
    torch._dynamo.reset()
    model, backend = blocks(3), Counted()
    twin, net = copy.deepcopy(model), nn.Sequential(model, nn.Flatten(), nn.Linear(15, 4))
    plain = nn.Sequential(twin, *copy.deepcopy(net[1:]))
    if how == "blocks":
        for block in model[1:4]:
            block.compile(backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05) for m in (net, plain)]
    seen = []
    for i in range(4):
        x, y = batch(i), torch.arange(6) % 4
        attacked = [pgd(m, x, y, norm=2, eps=0.5, steps=3) for m in (net, plain)]
        torch.testing.assert_close(*attacked, rtol=1e-4, atol=1e-5)
        losses = [step(m, a, o) for m, a, o in zip((net, plain), attacked, optimizers)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
        seen.append(backend.n)
    assert seen[1:] == [seen[0]] * 3


@pytest.mark.slow
@pytest.mark.parametrize(("how", "mode"), [("whole", "reduce-overhead"), ("blocks", "default")])
def test_training_by_inductor(how: str, mode: str) -> None:
    torch._dynamo.reset()
    model = blocks(2) if how == "blocks" else normalised()
    twin = copy.deepcopy(model)
    if how == "blocks":
        for block in model[1:3]:
            block.compile(fullgraph=True, mode=mode)
    else:
        model.compile(fullgraph=True, mode=mode)
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (model, twin)]
    x = batch(0) if how == "blocks" else torch.randn(5, 2, 8, 8)
    for i in range(4):
        if i == 2:
            torch._dynamo.config.error_on_recompile = True
        try:
            losses = [step(m, x + i, o) for m, o in zip((model, twin), optimizers)]
        finally:
            torch._dynamo.config.error_on_recompile = False
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert sn_fast.sigmas(model) == pytest.approx(sn_fast.sigmas(twin), rel=1e-3)
