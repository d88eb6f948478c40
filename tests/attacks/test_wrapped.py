"""Models inside PyTorch's wrappers: an attack is no step of their training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import sn_fast
from sn_fast.attacks import fgm, graph, methods, pgd, wrappers, wrm

from ..process_groups import process_group, run_in_group
from .models import same_bits

STEPS, BATCH = 2, 8
ATTACKS: tuple[Callable[..., Tensor], ...] = (
    partial(pgd, eps=0.3, steps=2),
    partial(fgm, eps=0.3),
    partial(wrm, eps=0.3, steps=1),
)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model[1].register_buffer("seen", torch.zeros(()))  # which a wrapper would broadcast in each forward
    return model


def normalised_network() -> nn.Sequential:
    return sn_fast.apply_spectral_norm(network(), torch.zeros(1, 6), beta=0.5)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 6, generator=generator), torch.randint(3, (BATCH,), generator=generator)


def train(model: nn.Module, part: slice) -> list[Tensor]:
    """Adversarial training on a part of each batch: the parameters and their gradients after it."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(STEPS):
        x, y = (t[part] for t in batch(step))
        for attack in ATTACKS:
            x_adv = attack(model, x, y)
            assert (x_adv != x).any(dim=1).all()
            optimizer.zero_grad()
            F.cross_entropy(model(x_adv), y).backward()
            optimizer.step()
    return [t.detach().clone() for p in model.parameters() for t in (p, p.grad)]


def parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **options)


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "static graph": lambda: parallel(network(), static_graph=True),
    "plain": lambda: parallel(network()),
    "unused parameters": lambda: parallel(network(), find_unused_parameters=True),
    "inside a model": lambda: nn.Sequential(nn.Identity(), parallel(network(), static_graph=True)),
    "compiled inside": lambda: parallel(torch.compile(network(), backend="aot_eager"), static_graph=True),
    "compiled outside": lambda: torch.compile(parallel(network(), static_graph=True), backend="aot_eager"),
    "normalised": lambda: parallel(normalised_network(), static_graph=True),
}


def in_group(rank: int, world: int, folder: Path) -> None:
    """One process of several: trains in every wrapper, and saves what came out."""
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    results = {name: train(WRAPPED[name](), part) for name in ("static graph", "inside a model", "normalised")}
    torch.save(results, folder / f"{rank}.pt")


def expected(name: str) -> list[Tensor]:
    return train(normalised_network() if name == "normalised" else network(), slice(None))


def test_replicas_stay_equal_and_equal_to_a_single_process(tmp_path: Path) -> None:
    run_in_group(in_group, 2, tmp_path, folder=tmp_path, size=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, tensors in first.items():
        for mine, theirs, alone in zip(tensors, second[name], expected(name), strict=True):
            assert same_bits(mine, theirs), name
            torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    with process_group(tmp_path):
        yield


@pytest.mark.parametrize("name", WRAPPED)
def test_a_group_of_one(group: None, name: str) -> None:
    torch.compiler.reset()
    for found, wanted in zip(train(WRAPPED[name](), slice(None)), expected(name), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_wrapper_is_not_called_and_left_as_it_was(group: None, name: str, attack: Callable[..., Tensor]) -> None:
    model = WRAPPED[name]()
    calls: list[nn.Module] = []
    inside = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    for m in inside:
        m._pre_forward = lambda *args, m=m, **kwargs: calls.append(m)
    before = [dict(vars(m)) for m in model.modules()]
    model.train()
    attack(model, *batch(0))
    assert inside
    assert not calls
    assert all(m.training for m in model.modules())
    assert [vars(m).keys() for m in model.modules()] == [b.keys() for b in before]
    assert all("forward" not in vars(m) for m in inside)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory, say")

    inner = next(m for m in model.modules() if isinstance(m, nn.Linear))
    torch.compiler.reset()
    with inner.register_forward_pre_hook(fail), pytest.raises(RuntimeError, match="out of memory"):
        attack(model, *batch(0))
    assert all("forward" not in vars(m) for m in inside)


def test_training_mode_and_buffers_of_a_wrapped_model(group: None) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model = parallel(net, static_graph=True)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for mode in ("eval", "train", "keep"):
        torch.testing.assert_close(
            pgd(model, *batch(0), eps=0.3, model_mode=mode), pgd(net, *batch(0), eps=0.3, model_mode=mode)
        )
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("version", [1, 2])
def test_sharded_models_are_attacked_through_their_wrapper(group: None, version: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    wanted = pgd(network(), *batch(0), eps=0.3, steps=2)
    if version == 1:
        model: nn.Module = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    else:
        model = fully_shard(network())
    torch.testing.assert_close(pgd(model, *batch(0), eps=0.3, steps=2), wanted)
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(pgd(model, x, y, eps=0.3, steps=2), wanted)


def test_compiled_models_run_compiled() -> None:
    torch.compiler.reset()
    model = torch.compile(network(), backend="aot_eager")
    assert wrappers.unwrapped(model) is model
    torch.testing.assert_close(pgd(model, *batch(0), eps=0.3), pgd(network(), *batch(0), eps=0.3))


def test_data_parallel_is_called_as_it_is() -> None:
    model = DataParallel(network())
    calls: list[Any] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    x_adv = pgd(model, *batch(0), eps=0.3, steps=2)
    torch.testing.assert_close(x_adv, pgd(model.module, *batch(0), eps=0.3, steps=2))
    assert len(calls) == 2


def test_replicas_do_not_get_weights_frozen_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without several GPUs: DataParallel copies attributes as they are, and the frozen weight would stay behind."""
    net = normalised_network()
    model = DataParallel(net)
    frozen: list[bool] = []
    net[0].register_forward_pre_hook(lambda *_: frozen.append(net[0].parametrizations.weight[0]._frozen is not None))
    pgd(model, *batch(0), eps=0.3, steps=1)
    monkeypatch.setattr(wrappers, "is_replicated", lambda model: True)
    monkeypatch.setattr("sn_fast.attacks.gradient.is_replicated", lambda model: True)
    pgd(model, *batch(0), eps=0.3, steps=1)
    assert frozen == [True, False]
    monkeypatch.undo()
    model.device_ids = [0, 1]
    assert wrappers.is_replicated(nn.Sequential(model))
    assert not wrappers.is_replicated(net)


def test_graphs_are_of_the_module(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    monkeypatch.setattr(methods, "_check_graph", lambda model, x: None)

    def run(model: nn.Module, options: Any, loop: Any, tensors: Any, check: Any) -> Any:
        seen.append(model)
        return loop(tensors, {})

    monkeypatch.setattr(graph, "run", run)
    model = parallel(network(), static_graph=True)
    x_adv = pgd(model, *batch(0), eps=0.3, cuda_graph=True)
    assert seen == [model.module]
    torch.testing.assert_close(x_adv, pgd(network(), *batch(0), eps=0.3))
