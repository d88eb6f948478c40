"""What the processes of a distributed test run; in a module of its own, for processes import it by name."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
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


def block(n: int, m: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n, m), nn.ReLU())


def blocks(normalised: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(block(16, 32), block(32, 32), nn.Linear(32, 4))
    return sn_fast.apply_spectral_norm(net, torch.randn(1, 16), mode="scale") if normalised else net


def fsdp1(model: nn.Module, how: str) -> nn.Module:
    """FullyShardedDataParallel, as the words in ``how`` say."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    options = {
        "per block": {"auto_wrap_policy": ModuleWrapPolicy({nn.Sequential})},
        "grad op": {"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP},
        "bfloat16": {"mixed_precision": MixedPrecision(param_dtype=torch.bfloat16)},
    }
    chosen = {key: value for words, given in options.items() if words in how for key, value in given.items()}
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, use_orig_params="original" in how, device_id=cpu, **chosen)


def fsdp2(model: nn.Module, how: str) -> nn.Module:
    """fully_shard, as the words in ``how`` say."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if "bfloat16" in how:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    if "kept" in how:
        options["reshard_after_forward"] = False
    parts = {"per block": list(model), "per layer": [m for m in model.modules() if isinstance(m, nn.Linear)]}
    for words, modules in parts.items():
        for module in modules if words in how else ():
            fully_shard(module, **options)
    return fully_shard(model, **options)


def shard(model: nn.Module, how: str) -> nn.Module:
    return (fsdp1 if how.startswith("FSDP1") else fsdp2)(model, how)


def for_each(rank: int, function: Callable[[int, str], None], hows: list[str]) -> None:
    """Several cases in one start of the processes."""
    for how in hows:
        function(rank, how)


def sharded_as_one(rank: int, how: str) -> None:
    """Under FSDP each step uses the norms of the gathered weights, which are those of one process without FSDP."""
    warnings.simplefilter("ignore")
    world = dist.get_world_size()
    alone, model = blocks(), blocks()
    wrapped = shard(model, how)
    in_use: dict[str, Tensor] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        in_use[str(id(module))] = torch.linalg.matrix_norm(_full(module.weight.detach()).float(), 2)

    for module in wrapped.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(look)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01) for m in (alone, wrapped)]
    near = 2e-2 if "bfloat16" in how else 1e-4
    for i in range(12):
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(i))
        for m, part in ((alone, x), (wrapped, x.chunk(world)[rank])):
            (m(part).float() - 3 * part[:, :4]).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        assert len(in_use) == 3
        for norm in in_use.values():
            torch.testing.assert_close(norm, torch.tensor(1.0), rtol=2e-2, atol=0)
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if how.startswith("FSDP2") and version < (2, 9):  # on gloo torch 2.7 does not train a plain network right either
        return
    with torch.no_grad():
        torch.testing.assert_close(wrapped(x).float(), alone(x), rtol=near, atol=near)
    ours, theirs = ([m for m in n.modules() if isinstance(m, SpectralNorm)] for n in (wrapped, alone))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.sigma, other.sigma, rtol=near, atol=0)


def refused(rank: int) -> None:
    """A layer without the model that FSDP knows, and flat parameters: the error names the remedy, nothing changes."""
    warnings.simplefilter("ignore")
    for how, remedy in (("FSDP2", "whole model that fully_shard"), ("FSDP1, flat parameters", "use_orig_params=True")):
        wrapped = shard(blocks(normalised=False), how)
        names = [n for n, _ in wrapped.named_parameters()]
        layer = next(m for m in wrapped.modules() if isinstance(m, nn.Linear))
        if how == "FSDP2":
            with pytest.raises(ValueError, match=rf"Linear.weight is sharded already.*{remedy}"):
                sn_fast.spectral_norm(layer)
            with pytest.raises(ValueError, match="matches no layer"):
                sn_fast.apply_spectral_norm(wrapped, torch.randn(1, 16), beta={"none": 1.0})
        else:
            with pytest.raises(ValueError, match=rf"layer '0.0' is sharded already.*{remedy}"):
                sn_fast.apply_spectral_norm(wrapped, torch.randn(1, 16))
        assert [n for n, _ in wrapped.named_parameters()] == names
        wrapped(torch.randn(2, 16)).sum().backward()


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


def refreshed_together(rank: int) -> None:
    """Layers that are gathered together are refreshed in one call, also in blocks, and once for each change."""
    warnings.simplefilter("ignore")
    from sn_fast.normalization import under_way
    from sn_fast.ops import refresh

    for how, wanted in (("FSDP2 per block", [1, 2, 3]), ("FSDP2 root", [6]), ("FSDP2 per layer", [1] * 6)):
        torch.manual_seed(0)
        first = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
        net = nn.Sequential(first, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Linear(8, 4))
        plain = sn_fast.apply_spectral_norm(net, torch.randn(1, 8), mode="scale")
        alone, model = copy.deepcopy(plain), shard(plain, how)
        real, sizes = refresh.advance, []

        def counted(weights: list[Tensor], *args: object, real: Callable = real, sizes: list = sizes) -> None:
            sizes.append(len(weights))
            real(weights, *args)

        x = torch.randn(4, 8)
        optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (alone, model)]
        for i in range(4):
            refresh.advance = counted if i == 2 else real
            try:
                outputs = [alone(x)] if i != 2 else []
                outputs.append(model(x))
            finally:
                refresh.advance = real
            if i == 2:
                outputs.append(alone(x))
            torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
            for output, optimizer in zip(outputs if i != 2 else outputs[::-1], optimizers, strict=True):
                optimizer.zero_grad()
                output.square().mean().backward()
                optimizer.step()
        assert sorted(sizes) == wanted, (how, sizes)
        assert not under_way._threads.forwards
