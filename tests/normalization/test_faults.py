"""What goes wrong in a training step leaves u, v and sigma as they belong to the weight, and training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sn_fast
from sn_fast.attacks import fgm, pgd, wrm

from ..on_device import DEVICE
from ..process_groups import run_in_group


def network(device: torch.device | str = DEVICE, **options: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).to(device)
    return sn_fast.apply_spectral_norm(net, torch.rand(1, 3, 6, 6).to(device), mode="scale", **options)


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in net.state_dict().items()}


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient", ["detached", "full"])
def test_a_step_that_the_scaler_skips_moves_nothing(fault: float, gradient: str) -> None:
    net = network(gradient=gradient)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    x, y = torch.rand(5, 3, 6, 6).to(DEVICE), (torch.arange(5) % 3).to(DEVICE)

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(factor * F.cross_entropy(net(x), y)).backward()
        scaler.step(optimizer)
        scaler.update()

    for _ in range(3):
        step(1.0)
    net(x)  # brings sigma up to the last step
    before = state_of(net)
    for _ in range(2):
        step(fault)
        net(x)
        after = state_of(net)
        assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert scaler.get_scale() == 256.0  # twice halved
    for _ in range(3):
        step(1.0)
    sn_fast.update_spectral_norm(net, 100)
    assert not torch.equal(
        state_of(net)["0.parametrizations.weight.original"], before["0.parametrizations.weight.original"]
    )
    for name, sigma in sn_fast.sigmas(net).items():
        size = (6, 6) if name == "0" else None
        raw = sn_fast.operator_of(net.get_submodule(name), size, raw=True)
        assert sigma == pytest.approx(float(torch.linalg.matrix_norm(raw.to_dense().detach().double(), 2)), rel=5e-3)


@pytest.mark.parametrize("attack", ["pgd", "pgd 2", "fgm", "wrm"])
def test_an_empty_batch_is_attacked_and_learned_from_as_nothing(attack: str) -> None:
    net = network()
    x, y = torch.rand(0, 3, 6, 6).to(DEVICE), torch.arange(0).to(DEVICE)
    before = state_of(net)
    found = {
        "pgd": lambda: pgd(net, x, y, norm="inf", eps=0.1, steps=3, clip=(0, 1)),
        "pgd 2": lambda: pgd(net, x, norm=2, eps=0.1, steps=3, random_start=True),
        "fgm": lambda: fgm(net, x, y, norm=2, eps=0.1),
        "wrm": lambda: wrm(net, x, y, gamma=1.0, steps=3),
    }[attack]()
    assert found.shape == x.shape
    F.cross_entropy(net(found), y, reduction="sum").backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    after = state_of(net)
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def steps_of(rank: int, folder: str, sizes: list[list[int]]) -> None:
    net = network("cpu")
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for step, of_ranks in enumerate(sizes):
        x, y = batch(step, sum(of_ranks))
        x, y = (t.split(of_ranks)[rank] for t in (x, y))
        x = pgd(wrapped, x, y, norm="inf", eps=0.02, steps=2, clip=(0, 1))
        optimizer.zero_grad()
        (F.cross_entropy(wrapped(x), y, reduction="sum") * len(of_ranks) / sum(of_ranks)).backward()
        optimizer.step()
    wrapped(x)
    torch.save(net.state_dict(), f"{folder}/{rank}.pt")


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.rand(size, 3, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator)


@pytest.mark.slow
def test_a_rank_without_samples_goes_along(tmp_path: Path) -> None:
    """Two ranks, of which one has none in some steps: the weights and sigmas of one process with all samples."""
    sizes = [[4, 2], [6, 0], [0, 3], [5, 5]]
    run_in_group(steps_of, str(tmp_path), sizes, folder=tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(t, second[name]) for name, t in first.items())
    net = network("cpu")
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for step, of_ranks in enumerate(sizes):
        x, y = batch(step, sum(of_ranks))
        x = pgd(net, x, y, norm="inf", eps=0.02, steps=2, clip=(0, 1))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    net(x)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)
