"""What the processes of a distributed test run; in a module of its own, for processes import it by name."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

import sn_fast
from sn_fast.normalization.parametrization import SpectralNorm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return sn_fast.apply_spectral_norm(net, torch.randn(1, 16), mode="scale")


def _train(model: nn.Module, rank: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.02)
    torch.manual_seed(rank)
    for _ in range(12):
        x = torch.randn(8, 16)
        _ = torch.randn(4096 * rank + 1)  # the processes use memory differently
        (model(x) - 3 * x[:, :4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _full(weight: Tensor) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def sharded(rank: int, how: str) -> None:
    """Train under FSDP; all processes have the same state, and it belongs to the whole weights."""
    warnings.simplefilter("ignore")
    model = network()
    layers = model[0], model[2]
    members = [m for m in model.modules() if isinstance(m, SpectralNorm)]
    before = [m.sigma.clone() for m in members]
    if how == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrapped: nn.Module = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in layers if how == "FSDP2 per layer" else ():
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    _train(wrapped, rank)
    with torch.no_grad():
        wrapped(torch.zeros(1, 16))
    states = [b.clone() for m in members for b in m.buffers()]
    every: list[object] = [None, None]
    dist.all_gather_object(every, states)
    assert all(torch.equal(a, b) for a, b in zip(*every, strict=True)), "the processes' states differ"
    assert all(not torch.equal(m.sigma, s) for m, s in zip(members, before)), "the state did not move"
    if how == "FSDP1":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(wrapped):
            weights = [layer.parametrizations.weight.original.detach().clone() for layer in layers]
    else:
        weights = [_full(layer.parametrizations.weight.original.detach()) for layer in layers]
    for member, weight in zip(members, weights):
        true = torch.linalg.matrix_norm(weight, 2)
        torch.testing.assert_close(member.sigma, true, rtol=2e-2, atol=0)
    saved = wrapped.state_dict()
    assert any(name.endswith("sigma") for name in saved)
