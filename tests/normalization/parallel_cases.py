"""Tensor-parallel transformers beside one process: what the processes run."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import sn_fast

from .sharded_cases import check_rank_0_alone_is_refused, members
from .sharded_checkpoints import assert_near

WIDTH, HEADS, TOKENS, WORDS = 12, 4, 5, 11
LR = 0.05


class Block(nn.Module):
    """Attention and a perceptron, each a column-wise and a row-wise matrix in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k, v = (m(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for m in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.words(x)))


def transformer(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Transformer().to(dtype)


def parallel(model: nn.Module, mesh: Any = None) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: dict[str, Any] = {f"blocks.*.{name}": ColwiseParallel() for name in ("q", "k", "v", "up")}
    plan |= {f"blocks.*.{name}": RowwiseParallel() for name in ("o", "down")}
    plan |= {"words": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    return parallelize_module(model, mesh or init_device_mesh("cpu", (dist.get_world_size(),)), plan)


def normalise(model: nn.Module, **options: Any) -> nn.Module:
    words = torch.zeros(1, TOKENS, dtype=torch.long)
    return sn_fast.apply_spectral_norm(model, words, beta=0.7, include=(nn.Linear, nn.Embedding), **options)


def words(number: int) -> Tensor:
    return torch.randint(WORDS, (4, TOKENS), generator=torch.Generator().manual_seed(number % 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    x = words(number)
    loss = F.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def full(t: Any) -> Tensor:
    found: Tensor = t.full_tensor() if hasattr(t, "full_tensor") else t
    return found.detach()


def as_one(rank: int, folder: Path) -> None:
    warnings.simplefilter("ignore")
    for dtype, mode, near, steps in ((torch.float64, "cap", 1e-11, 40), (torch.float32, "scale", 1e-5, 12)):
        alone = normalise(transformer(dtype), mode=mode)
        model = normalise(parallel(transformer(dtype)), mode=mode)
        optimizers = [torch.optim.SGD(m.parameters(), LR, momentum=0.9) for m in (alone, model)]
        for i in range(steps):
            wanted, found = (step(m, o, i) for m, o in zip((alone, model), optimizers))
            assert abs(found - wanted) <= near * wanted, (dtype, i, found, wanted)
        check_states(model, alone, near)
    check_placements(model)
    check_outside(model, alone, optimizers, rank)
    check_saved(model, optimizers[1], folder)
    check_refused()


def check_states(model: nn.Module, alone: nn.Module, near: float) -> None:
    """Each layer's state is that of one process, with equal bits of sigma on all ranks; some are above the cap."""
    for one, other in zip(members(model), members(alone), strict=True):
        torch.testing.assert_close(one.sigma, other.sigma, rtol=100 * near, atol=0)
        for name in ("u", "v"):
            torch.testing.assert_close(full(one.state(name)), other.state(name), rtol=0, atol=1e4 * near)
        every = [torch.empty_like(one.sigma) for _ in range(dist.get_world_size())]
        dist.all_gather(every, one.sigma)
        assert all(torch.equal(every[0], s) for s in every)
    assert any(m.sigma > 0.7 for m in members(model))


def check_placements(model: nn.Module) -> None:
    """u lies with the rows, v with the columns."""
    for name, one, other in (("up", "Shard", "Replicate"), ("down", "Replicate", "Shard")):
        p = model.get_submodule(f"blocks.0.{name}.parametrizations.weight.0")
        assert [type(p.get_buffer(b).placements[0]).__name__ for b in "uv"] == [one, other]  # type: ignore[attr-defined]


def check_outside(model: nn.Module, alone: nn.Module, optimizers: list[torch.optim.Optimizer], rank: int) -> None:
    for m, o in zip((alone, model), optimizers):
        step(m, o, 100)
    assert sn_fast.sigmas(model) == pytest.approx(sn_fast.sigmas(alone), rel=1e-4)
    ours, theirs = sn_fast.spectral_norm_summary(model), sn_fast.spectral_norm_summary(alone)
    assert ours.split()[:9] == theirs.split()[:9]
    sn_fast.update_spectral_norm(model, 200)
    for name, sigma in sn_fast.sigmas(model).items():
        weight = full(model.get_submodule(name).parametrizations.weight.original)
        assert sigma == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)
    if rank == 0:  # nothing has moved since
        assert sn_fast.sigmas(model)
    dist.barrier()
    step(model, optimizers[1], 101)
    if rank == 0:
        assert any(name.endswith("sigma") for name in model.state_dict())
        check_rank_0_alone_is_refused(model)
    dist.barrier()
    assert sn_fast.sigmas(model)


def check_saved(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """DCP: another model goes on with the losses of this one."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "dcp")
    other = normalise(parallel(transformer(torch.float32, seed=1)), mode="scale")
    theirs = torch.optim.SGD(other.parameters(), LR, momentum=0.9)
    step(other, theirs, 3)
    weights, moments = get_state_dict(other, theirs)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=folder / "dcp")
    set_state_dict(other, theirs, model_state_dict=weights, optim_state_dict=moments)
    numbers = range(200, 204)
    assert_near([step(other, theirs, i) for i in numbers], [step(model, optimizer, i) for i in numbers])


def check_refused() -> None:
    for options in ({"bound": True}, {"gradient": "full"}):
        with pytest.raises(ValueError, match=r"needs the whole weight, and .* is tensor-parallel"):
            normalise(parallel(transformer(torch.float32)), **options)
    model = parallel(transformer(torch.float32))
    before = copy.copy(dict(model.named_parameters()))
    with pytest.raises(ValueError, match="is sharded already"):
        sn_fast.spectral_norm(model.head)
    assert dict(model.named_parameters()).keys() == before.keys()
    with pytest.raises(RuntimeError, match=r"normalised already.*call it first"):
        parallel(normalise(transformer(torch.float32)))


def with_fsdp(rank: int) -> None:
    """Two by two: tensor-parallel, normalised, and then sharded by fully_shard."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data = mesh["data"]
    model = normalise(parallel(transformer(torch.float64), mesh["tensor"]))
    for block in model.blocks:
        fully_shard(block, mesh=data)
    fully_shard(model, mesh=data)
    alone = normalise(transformer(torch.float64))
    optimizers = [torch.optim.SGD(m.parameters(), LR, momentum=0.9) for m in (alone, model)]
    for i in range(8):
        wanted = step(alone, optimizers[0], i)
        x = words(i).chunk(2)[data.get_local_rank()]
        loss = F.cross_entropy(model(x).flatten(0, 1), x.roll(1, 1).flatten())
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        both = loss.detach().clone()
        dist.all_reduce(both, group=data.get_group())
        assert_near([float(both) / 2], [wanted], rel=1e-11)
    assert sn_fast.sigmas(model) == pytest.approx(sn_fast.sigmas(alone), rel=1e-9)
    ours, theirs = sn_fast.spectral_norm_summary(model), sn_fast.spectral_norm_summary(alone)
    assert ours.split()[:9] == theirs.split()[:9]
    sn_fast.update_spectral_norm(model, 3)
    sn_fast.update_spectral_norm(alone, 3)
    assert sn_fast.sigmas(model) == pytest.approx(sn_fast.sigmas(alone), rel=1e-9)
