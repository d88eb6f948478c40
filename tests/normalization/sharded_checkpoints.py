"""Saving and loading sharded models: what the processes run, one folder for all of them."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import sn_fast

from .sharded_cases import Alone, Case, X, batch, loss_of, made, members, network, normalise, shard

CASE = Case("FSDP2 per block")
LATE = CASE._replace(after=True)
BEFORE, AFTER = 8, 3  # steps before and after the checkpoint
LR = 0.1  # so large that a state is well behind the weights


def global_batch(number: int) -> Tensor:
    """Of 12 samples, for 1, 2, 3 and 4 processes."""
    return torch.cat(list(batch(CASE, number, 2)))


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, numbers: Sequence[int], rank: int, world: int
) -> list[float]:
    losses = []
    for number in numbers:
        loss = loss_of(model, global_batch(number).chunk(world)[rank], 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone() / world
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), LR, momentum=0.9)


def expected() -> list[float]:
    """The losses of one process that never stopped."""
    alone = Alone(CASE, LR)
    for number in range(BEFORE + AFTER):
        alone.step([[global_batch(number)]])
    return alone.losses


def assert_near(found: Sequence[float], wanted: Sequence[float], rel: float = 1e-5) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        assert abs(a - b) <= rel * abs(b), (list(found), list(wanted))


def save(rank: int, folder: Path) -> None:
    """Train on these processes, save, and go on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict

    warnings.simplefilter("ignore")
    world, wanted = dist.get_world_size(), expected()
    model = made(CASE)
    optimizer = optimizer_of(model)
    assert_near(steps(model, optimizer, range(BEFORE), rank, world), wanted[:BEFORE])
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder / "dcp")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
    assert_near(steps(model, optimizer, range(BEFORE, BEFORE + AFTER), rank, world), wanted[BEFORE:])


def load(rank: int, folder: Path) -> None:
    """Go on from the checkpoint on as many processes as there are, in models that started otherwise."""
    warnings.simplefilter("ignore")
    wanted = expected()[BEFORE:]
    for case in (CASE, LATE):
        go_on(made(case), folder, rank, wanted)
    if dist.get_world_size() == 1:
        model = normalise(network(), CASE)
        cut_short(model, folder)
        go_on(model, folder, rank, wanted)
        from_whole_files(folder)
    built_on_meta(folder, rank, wanted)
    from_torchs(rank)


def killed(rank: int, folder: Path) -> None:
    """Go on from the checkpoint, and lose a process in the middle of a backward, with the next checkpoint begun."""
    import torch.distributed.checkpoint as dcp

    warnings.simplefilter("ignore")
    world = dist.get_world_size()
    model = made(CASE)
    dcp.load({"model": model.state_dict()}, checkpoint_id=folder / "dcp")
    x = global_batch(BEFORE).chunk(world)[rank].requires_grad_()
    if rank == 1:
        (folder / "next").mkdir()
        shutil.copy(folder / "dcp" / "__1_0.distcp", folder / "next")  # DCP writes its .metadata last
        x.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
    loss_of(model, x, 1).backward()
    optimizer_of(model).step()
    steps(model, optimizer_of(model), [BEFORE], rank, world)


def cut_short(model: nn.Module, folder: Path) -> None:
    """A checkpoint without its last file, or with half of one, does not load."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    state = {"model": model.state_dict()}
    if (folder / "next").exists():
        with pytest.raises(CheckpointException, match=r"\.metadata"):
            dcp.load(state, checkpoint_id=folder / "next")
    if not (folder / "half").exists():
        shutil.copytree(folder / "dcp", folder / "half")
        file = folder / "half" / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointException):
        dcp.load(state, checkpoint_id=folder / "half")


def go_on(model: nn.Module, folder: Path, rank: int, wanted: Sequence[float]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    world = dist.get_world_size()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    optimizer = optimizer_of(model)
    steps(model, optimizer, [7], rank, world)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    assert_near(steps(model, optimizer, range(BEFORE, BEFORE + AFTER), rank, world), wanted)


def from_whole_files(folder: Path) -> None:
    """Files of whole tensors, also of safetensors, and with assign=True: the state comes along."""
    stored = torch.load(folder / "whole.pt", weights_only=True)
    files = [stored]
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        pass
    else:
        save_file({k: v.contiguous() for k, v in stored.items()}, folder / "whole.safetensors")
        files.append(load_file(folder / "whole.safetensors"))
    outputs = []
    for state in files:
        for assign in (False, True):
            model = normalise(network(), CASE)
            model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=assign)
            outputs.append(model(global_batch(0)))
    meta = normalise(network(), CASE).to("meta")
    meta.load_state_dict({k: v.clone() for k, v in stored.items()}, assign=True)
    outputs.append(meta(global_batch(0)))
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def built_on_meta(folder: Path, rank: int, wanted: Sequence[float]) -> None:
    """Built on meta, normalised, sharded, materialised: then loaded, or initialised, and no NaN of the memory stays."""
    world = dist.get_world_size()
    for after, initialised in ((False, False), (False, True), (True, True)):
        with torch.device("meta"):
            model: nn.Module = network()
        if after:  # no forward tells the input sizes of convolutions
            model = shard(model, LATE)
            with pytest.raises(ValueError, match=r"sharded and on meta.*normalise first"):
                normalise(model, LATE)
            sn_fast.apply_spectral_norm(model, torch.zeros(1, *X), mode=CASE.mode, include=nn.Linear)
        else:
            model = shard(normalise(model, CASE), CASE)
        assert all(p.is_meta for p in model.parameters())
        model.to_empty(device="cpu")
        for t in (*model.parameters(), *model.buffers()):
            local = t.to_local() if hasattr(t, "to_local") else t
            with torch.no_grad():
                local.fill_(float("nan"))
        if initialised:
            initialise(model)
            assert bool(model(global_batch(0).chunk(world)[rank]).isfinite().all())
            check_sigmas(model)
        else:
            load_whole(model, torch.load(folder / "whole.pt", weights_only=True))
            optimizer = torch.optim.SGD(model.parameters(), 0.0)
            assert_near(steps(model, optimizer, [BEFORE], rank, world), wanted[:1])


def initialise(model: nn.Module) -> None:
    """Every process draws the whole of each parameter, and keeps its shard."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for i, p in enumerate(model.parameters()):
        drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3
        with torch.no_grad():
            p.copy_(distribute_tensor(drawn, p.device_mesh, p.placements) if isinstance(p, DTensor) else drawn)


def check_sigmas(model: nn.Module, rel: float = 1e-2) -> None:
    """Each matrix's sigma beside the dense norm of the whole weight."""
    for p in members(model):
        raw: Any = p.raw
        weight = raw.full_tensor() if hasattr(raw, "full_tensor") else raw
        if weight.ndim > 2:
            continue
        true = torch.linalg.matrix_norm(weight.detach().double(), 2)
        assert abs(float(p.sigma) / float(true) - 1) < rel, (float(p.sigma), float(true))


def load_whole(model: nn.Module, state: dict[str, Any]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def from_torchs(rank: int) -> None:
    """A checkpoint of torch's own spectral_norm."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 9))
    theirs = nn.Sequential(
        *[nn.utils.parametrizations.spectral_norm(m) if isinstance(m, nn.Linear) else m for m in net]
    )
    x = torch.randn(4, 16)
    for _ in range(30):
        wanted = theirs(x)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 9))
    sn_fast.apply_spectral_norm(model, x, mode="scale")
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    load_whole(model, {k: v.clone() for k, v in theirs.state_dict().items()})
    torch.testing.assert_close(model(x), wanted, rtol=1e-3, atol=1e-3)
