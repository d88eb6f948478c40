"""What the processes of the tests under DistributedDataParallel run; in a module of its own, to be imported by name."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel as DDP

import sn_fast
from sn_fast.attacks import pgd

from .cases import members

MASK = (1, 0, 2, 1, 0, 2, 2, 1)


class Network(nn.Module):
    """A convolution, a matrix, and a branch that only some forwards use; a buffer that is none of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 25, 3)
        self.branch = nn.Linear(3, 3)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, x: Tensor, branch: bool = True) -> Tensor:
        y = self.fc(torch.relu(self.conv(x)).flatten(1))
        return self.branch(y) if branch else y


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    return sn_fast.apply_spectral_norm(Network(), torch.randn(1, 2, 5, 5), mode="scale")


def batch(i: int, n: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 2, 5, 5, generator=torch.Generator().manual_seed(i))
    return x, torch.tensor(MASK)[:n]


def loss_of(model: nn.Module, x: Tensor, y: Tensor, **options) -> Tensor:
    return nn.functional.cross_entropy(model(x, **options), y)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def assert_equal_on_ranks(model: nn.Module) -> None:
    state = torch.cat([b.flatten().double() for m in members(model) for b in m.buffers()])
    every = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(every, state)
    assert all(torch.equal(s, every[0]) for s in every), "the ranks' states differ"


def assert_same_model(model: nn.Module, twin: nn.Module) -> None:
    """Weights and states are those of one process, and the norms in use are 1 by singular value decomposition."""
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    for m, n in zip(members(model), members(twin), strict=True):
        torch.testing.assert_close(m.sigma, n.sigma, rtol=1e-4, atol=0)
    norm = torch.linalg.matrix_norm(model.fc.weight.detach().double(), 2)
    assert abs(float(norm) - 1) < 0.05


def train(
    ddp: nn.Module,
    optimizer: torch.optim.Optimizer,
    twin: nn.Module,
    steps: int = 3,
    alone: Callable[[int], object] = lambda i: None,
    parts: int = 1,
    **options,
) -> None:
    """Steps of DDP with a share of each batch, and of one process with all of it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    plain = optimizer_of(twin)
    for i in range(steps):
        x, y = batch(i)
        mine = list(zip(x.chunk(size)[rank].chunk(parts), y.chunk(size)[rank].chunk(parts)))
        for j, (a, b) in enumerate(mine):
            with ddp.no_sync() if j < parts - 1 else contextlib.nullcontext():
                (loss_of(ddp, a, b, **options) / parts).backward()
        loss_of(twin, x, y, **options).backward()
        assert_equal_on_ranks(ddp)
        for o in (optimizer, plain):
            o.step()
            o.zero_grad()
        if rank == 0:
            alone(i)
    x, y = batch(99)
    with torch.no_grad():
        loss_of(ddp, x, y), loss_of(twin, x, y)
    assert_equal_on_ranks(ddp)
    assert_same_model(getattr(ddp.module, "_orig_mod", ddp.module), twin)


def one_rank_alone(rank: int, buffers: bool) -> None:
    """Ranks that began with other weights, and rank 0 that does more than the others between steps."""
    model, twin = network(seed=rank), network(seed=0)
    ddp = DDP(model, broadcast_buffers=buffers)
    ways: list[Callable[[], object]] = [
        lambda: model.eval()(batch(7)[0]),
        lambda: sn_fast.sigmas(model),
        model.state_dict,
        lambda: copy.deepcopy(model),
        lambda: sn_fast.update_spectral_norm(model),
        lambda: pgd(ddp, *batch(3), norm=2, eps=0.5, steps=2),
    ]
    train(ddp, optimizer_of(model), twin, len(ways), alone=lambda i: ways[i]())
    sent = {name for name, _ in ddp.module.named_buffers()} - ddp.parameters_to_ignore
    assert sent == {"steps"}
    ddp(batch(0)[0])  # DDP sends none in the forward after one without gradients
    model.steps.fill_(rank)
    ddp(batch(0)[0])
    assert bool((model.steps == (0 if buffers else rank)).all())  # the user's own buffers are sent as before


def trained_before(rank: int, ways: tuple[str, ...]) -> None:
    """Rank 0 resumes a run and sends its state as it is; the others begin with whatever they have."""
    for first in ways:
        model, twin = network(seed=rank), network(seed=0)
        for m in (model, twin) if rank == 0 else (twin,):
            optimizer = optimizer_of(m)
            for i in range(3):
                loss_of(m, *batch(20 + i)).backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                m(batch(0)[0])
        ddp = DDP(model)
        if first == "module":
            model(batch(0)[0])
        elif first == "compiled":
            torch._dynamo.reset()
            torch.compile(ddp, backend="eager")(batch(0)[0])
        else:
            ddp(batch(0)[0])
        assert all(
            torch.equal(m.sigma, n.sigma) and torch.equal(m.v, n.v) for m, n in zip(members(model), members(twin))
        )
        train(ddp, optimizer_of(model), twin, 3)


def kinds_of_wrapping(rank: int) -> None:
    for options, branch in (({"find_unused_parameters": True}, False), ({"static_graph": True}, True), ({}, True)):
        model, twin = network(seed=rank), network(seed=0)
        train(DDP(model, **options), optimizer_of(model), twin, branch=branch)
    model, twin = network(seed=rank), network(seed=0)
    train(DDP(model), optimizer_of(model), twin, parts=2)  # accumulated, with no_sync
    model, twin = network(seed=rank), network(seed=0)
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9)
    train(DDP(model), zero, twin)


def part_of_the_model(rank: int) -> None:
    """A model of which a part was normalised before it was put there, and one that is normalised when it is wrapped."""
    torch.manual_seed(0)
    whole = nn.Sequential(network(seed=0), nn.Linear(3, 3), nn.BatchNorm1d(3))
    ddp = DDP(whole)
    ddp(batch(0)[0])
    sent = {name for name, _ in whole.named_buffers()} - ddp.parameters_to_ignore
    assert sent == {"0.steps", "2.running_mean", "2.running_var", "2.num_batches_tracked"}
    late = DDP(nn.Sequential(nn.Flatten(), nn.Linear(50, 3)), broadcast_buffers=True)
    sn_fast.apply_spectral_norm(late, batch(0, 1)[0])
    assert not {name for name, _ in late.module.named_buffers()} - late.parameters_to_ignore
    late(batch(rank)[0]).sum().backward()
    assert_equal_on_ranks(late)


def uneven_inputs(rank: int) -> None:
    """A rank that has ended receives the last weights at once, and follows them by an iteration like any change."""
    model = network(seed=rank)
    ddp = DDP(model)
    optimizer = optimizer_of(model)
    with Join([ddp]):
        for i in range(3 + 2 * rank):
            loss_of(ddp, *batch(i)).backward()
            optimizer.step()
            optimizer.zero_grad()
    model(batch(0)[0])
    every = [torch.zeros(()) for _ in range(dist.get_world_size())]
    dist.all_gather(every, model.get_submodule("fc").parametrizations.weight[0].sigma)
    torch.testing.assert_close(every[0], every[1], rtol=1e-2, atol=0)
    norm = torch.linalg.matrix_norm(model.fc.weight.detach().double(), 2)
    assert abs(float(norm) - 1) < 0.05


def compilers(rank: int) -> None:
    for order in ("compiled, then wrapped", "wrapped, then compiled"):
        torch._dynamo.reset()
        model, twin = network(seed=rank), network(seed=0)
        if order.startswith("compiled"):
            ddp: nn.Module = DDP(torch.compile(model, backend="aot_eager"))
            train(ddp, optimizer_of(model), twin, 4)
        else:
            ddp = DDP(model)
            train(_Compiled(ddp), optimizer_of(model), twin, 4)
        x, y = batch(5)
        ours, theirs = (pgd(m, x, y, norm=2, eps=0.5, steps=2) for m in (ddp, twin))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class _Compiled(nn.Module):
    """A wrapper that is compiled, and keeps the names that ``train`` asks for."""

    def __init__(self, ddp: DDP) -> None:
        super().__init__()
        self.module = ddp.module
        self.run = torch.compile(ddp, backend="aot_eager")

    def forward(self, x: Tensor, **options) -> Tensor:
        return self.run(x, **options)


def ordinary(rank: int) -> None:
    warnings.simplefilter("ignore")
    one_rank_alone(rank, buffers=True)
    trained_before(rank, ("wrapper", "module"))
    part_of_the_model(rank)


def every_other(rank: int) -> None:
    warnings.simplefilter("ignore")
    one_rank_alone(rank, buffers=False)
    trained_before(rank, ("compiled",))
    kinds_of_wrapping(rank)
    uneven_inputs(rank)
    compilers(rank)
