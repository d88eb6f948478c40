"""Training of sharded models, each beside one process that trains the same network on the same data."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sn_fast
from sn_fast.normalization import meeting
from sn_fast.normalization.parametrization import SpectralNorm


class Case(NamedTuple):
    """How a model is sharded and trained. ``how`` holds words: FSDP1 or FSDP2, "per block", "per layer", "kept", ..."""

    how: str
    after: bool = False  # normalised after sharding
    dtype: torch.dtype = torch.float32
    accumulate: int = 1  # batches for one optimizer's step
    forwards: int = 1  # before each backward
    low: bool = False  # a mixed-precision policy
    mode: str = "scale"
    steps: int = 12


class Block(nn.Module):
    """A convolution or a matrix; ``again``: computed again in the backward."""

    def __init__(self, layer: nn.Module, again: bool = False) -> None:
        super().__init__()
        self.layer, self.again = layer, again

    def _run(self, x: Tensor) -> Tensor:
        return torch.nn.functional.elu(self.layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._run, x, use_reentrant=False) if self.again else self._run(x)


X = 2, 6, 6


def network(dtype: torch.dtype = torch.float32, again: bool = False) -> nn.Sequential:
    """Layers whose 4, 7 and 10 rows are no multiples of 2 and 3."""
    torch.manual_seed(0)
    return nn.Sequential(
        Block(nn.Conv2d(2, 4, 3, padding=1), again),
        Block(nn.Conv2d(4, 7, 3, stride=2, padding=1), again),
        nn.Flatten(),
        Block(nn.Linear(63, 10), again),
        nn.Linear(10, 5),
    ).to(dtype)


def normalise(model: nn.Module, case: Case) -> nn.Module:
    dtype = torch.bfloat16 if case.low and not case.after else case.dtype
    x = torch.zeros(1, *X, dtype=case.dtype if case.after else dtype)
    return sn_fast.apply_spectral_norm(model, x.to(case.dtype), mode=case.mode, beta=0.8)


def shard(model: nn.Module, case: Case) -> nn.Module:
    return (_fsdp1 if case.how.startswith("FSDP1") else _fsdp2)(model, case)


def _fsdp1(model: nn.Module, case: Case) -> nn.Module:
    from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": "flat" not in case.how}
    if "per block" in case.how:
        options["auto_wrap_policy"] = ModuleWrapPolicy({Block})
    if "per layer" in case.how:
        options["auto_wrap_policy"] = ModuleWrapPolicy({nn.Linear, nn.Conv2d})
    if "grad op" in case.how:
        options["sharding_strategy"] = ShardingStrategy.SHARD_GRAD_OP
    if "offload" in case.how:
        options["cpu_offload"] = CPUOffload(offload_params=True)
    if case.low:
        options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return FullyShardedDataParallel(model, **options)


def _fsdp2(model: nn.Module, case: Case) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if case.low:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if "offload" in case.how:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if "kept" in case.how:
        options["reshard_after_forward"] = False
    if "resharded" in case.how:  # the root too
        options["reshard_after_forward"] = True
    chosen: dict[str, Callable[[nn.Module], bool]] = {
        "per block": lambda m: isinstance(m, Block),
        "per layer": lambda m: isinstance(m, (nn.Linear, nn.Conv2d)),
    }
    for words, is_part in chosen.items():
        for module in [m for m in model.modules() if is_part(m)] if words in case.how else ():
            fully_shard(module, **options)
    return fully_shard(model, **options)


def made(case: Case) -> nn.Module:
    """The sharded and normalised model of a case."""
    model = network(case.dtype, "recomputed" in case.how)
    if case.after:
        return normalise(shard(model, case), case)
    return shard(normalise(model, case), case)


def batch(case: Case, number: int, parts: int) -> Sequence[Tensor]:
    x = torch.randn(6 * parts, *X, generator=torch.Generator().manual_seed(number % 4), dtype=torch.float64)
    return x.to(case.dtype).chunk(parts)


def loss_of(model: Callable[[Tensor], Tensor], x: Tensor, forwards: int) -> Tensor:
    """As if a batch came in parts, each of which is one forward."""
    wanted = x.flatten(1)[:, :5]
    parts = zip(x.chunk(forwards), wanted.chunk(forwards))
    return torch.stack([(model(part).to(x.dtype) - want).square().mean() for part, want in parts]).mean()


class Alone:
    """One process that trains the whole network; with a mixed-precision policy, on the same casts."""

    def __init__(self, case: Case, lr: float) -> None:
        self.case = case
        self.whole = network(case.dtype)
        low = self.whole.to(torch.bfloat16) if case.low else self.whole
        if case.low:
            self.whole = network(case.dtype)  # .to changes a module in place
        self.model = sn_fast.apply_spectral_norm(
            low, torch.zeros(1, *X).to(next(low.parameters())), mode=case.mode, beta=0.8
        )
        self.parameters = list(self.whole.parameters()) if case.low else list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr, momentum=0.9)
        self.losses: list[float] = []

    def step(self, batches: Sequence[Sequence[Tensor]]) -> None:
        """``batches``: those accumulated, each in the ranks' parts."""
        if self.case.low:
            with torch.no_grad():
                for low, p in zip(self._ordered(), self.parameters):
                    low.copy_(p)
        total = 0.0
        for parts in batches:
            for x in parts:
                loss = loss_of(self._run, x, self.case.forwards) / len(parts)
                loss.backward()
                total += float(loss.detach())
                if self.case.low:  # each rank's gradients are cast, then added
                    for low, p in zip(self._ordered(), self.parameters):
                        assert low.grad is not None
                        g = low.grad.to(p.dtype)
                        p.grad, low.grad = g if p.grad is None else p.grad + g, None
        self.losses.append(total)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _run(self, x: Tensor) -> Tensor:
        return self.model(x.to(torch.bfloat16) if self.case.low else x)

    def _ordered(self) -> list[Tensor]:
        """The low-precision parameters in the order of the whole ones, which no parametrization has moved."""
        named = {n.replace("parametrizations.weight.original", "weight"): p for n, p in self.model.named_parameters()}
        return [named[n] for n, _ in self.whole.named_parameters()]


def train(model: nn.Module, case: Case, optimizer: torch.optim.Optimizer, rank: int, number: int) -> float:
    """One step of a sharded model; returns all ranks' loss."""
    world = dist.get_world_size()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(case.accumulate):
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(i + 1 == case.accumulate)
        x = batch(case, number * case.accumulate + i, world)[rank]
        loss = loss_of(model, x, case.forwards)
        loss.backward()
        total += loss.detach().double() / world
    optimizer.step()
    optimizer.zero_grad()
    dist.all_reduce(total)
    return float(total)


def members(model: nn.Module) -> list[SpectralNorm]:
    return [m for m in model.modules() if isinstance(m, SpectralNorm)]


def as_one(rank: int, cases: Sequence[Case]) -> None:
    warnings.simplefilter("ignore")
    for case in cases:
        check_as_one(case, rank)


def check_as_one(case: Case, rank: int, lr: float = 0.02) -> None:
    """The model's losses and states are those of one process, and the ranks' states have equal bits."""
    world = dist.get_world_size()
    model, alone = made(case), Alone(case, lr)
    starts = [m.sigma.clone() for m in members(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    near = 1e-11 if case.dtype == torch.float64 else 1e-5
    for i in range(case.steps):
        alone.step([batch(case, i * case.accumulate + k, world) for k in range(case.accumulate)])
        loss = train(model, case, optimizer, rank, i)
        assert abs(loss - alone.losses[-1]) <= near * abs(alone.losses[-1]), (case, i, loss, alone.losses[-1])
    assert sum(alone.losses[-4:]) < sum(alone.losses[:4])
    states = [b.clone() for m in members(model) for b in (m.u, m.v, m.sigma)]
    assert all(torch.isfinite(s).all() for s in states)
    every: list[Any] = [None] * world
    dist.all_gather_object(every, states)
    for other in every:
        assert all(torch.equal(a, b) for a, b in zip(states, other, strict=True)), (case, "the ranks' states differ")
    for one, other in zip(members(model), members(alone.model), strict=True):
        torch.testing.assert_close(one.sigma, other.sigma, rtol=10 * near, atol=0, msg=str(case))
    for one, start in zip(members(model), starts, strict=True):
        assert not torch.equal(one.sigma, start), (case, "the state did not move")


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """A rank that is alone soon gives up."""
    patience, meeting.PATIENCE = meeting.PATIENCE, 0.5
    yield
    meeting.PATIENCE = patience


def check_rank_0_alone_is_refused(model: nn.Module) -> None:
    with impatient():
        for call in (sn_fast.sigmas, sn_fast.update_spectral_norm):
            with pytest.raises(RuntimeError, match=r"on rank 0: rank 1 did not call it within 0.5 s"):
                call(model)


def outside(rank: int, cases: Sequence[Case]) -> None:
    """What is done outside a forward: by all ranks together right, by one alone right or an error, and no hang."""
    warnings.simplefilter("ignore")
    kept_bytes(rank)
    for case in cases:
        check_outside(case, rank)


def check_outside(case: Case, rank: int, lr: float = 0.02) -> None:
    model, alone = made(case), Alone(case, lr)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)

    def step(number: int) -> None:
        alone.step([batch(case, number, dist.get_world_size())])
        train(model, case, optimizer, rank, number)

    def both(function: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
        return function(model), function(alone.model)

    step(0)
    ours, theirs = both(sn_fast.sigmas)  # of the weights after the step
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert list(ours) == list(theirs)
    ours, theirs = both(sn_fast.spectral_norm_summary)
    assert ours.split()[:8] == theirs.split()[:8]
    assert len(ours.splitlines()) == 5
    step(1)
    _, _ = both(lambda m: sn_fast.update_spectral_norm(m, 100))
    for name, sigma in sn_fast.sigmas(model).items():
        op = sn_fast.operator_of(alone.model.get_submodule(name), (6, 6) if name[0] in "01" else None, raw=True)
        assert sigma == pytest.approx(float(sn_fast.operator_norm(op, method="dense")), rel=1e-4)

    with torch.no_grad():
        model(batch(case, 0, 1)[0])
    if rank == 0:  # nothing has moved since the forward
        assert sn_fast.sigmas(model) == pytest.approx(sn_fast.sigmas(alone.model), rel=1e-4)
    dist.barrier()
    step(2)
    if rank == 0:
        if case.how.startswith("FSDP2"):
            assert any(name.endswith("sigma") for name in model.state_dict())
        check_rank_0_alone_is_refused(model)
    dist.barrier()
    step(3)
    ours, theirs = both(sn_fast.sigmas)
    assert ours == pytest.approx(theirs, rel=1e-5)
    with pytest.raises(RuntimeError, match="sharded by a module above the one given"):
        sn_fast.update_spectral_norm(next(m for m in model.modules() if isinstance(m, nn.Conv2d)))
    with pytest.raises(ValueError, match="is sharded; save the model's state dict"):
        sn_fast.remove_spectral_norm(model)
    step(4)


def kept_bytes(rank: int) -> None:
    """A normalised model keeps for the backward what the plain one keeps: no normalised copies of gathered weights."""
    from torch.profiler import ProfilerActivity, profile

    warnings.simplefilter("ignore")
    n, layers = 256, 4

    def kept(how: str, normalised: bool) -> int:
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(*[Block(nn.Linear(n, n)) for _ in range(layers)])
        model = shard(model, Case(how))
        if normalised:
            sn_fast.apply_spectral_norm(model, torch.zeros(1, n))
        x = torch.randn(2, n)
        model(x).sum().backward()
        totals: list[int] = []
        for _ in range(3):  # gloo's threads may free a buffer of one forward during the next
            dist.barrier()
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
                y = model(x)
            totals.append(sum(event.self_cpu_memory_usage for event in measured.key_averages()))
            y.sum().backward()
        return sorted(totals)[1]

    for how in ("FSDP2 per block", "FSDP2 per block kept", "FSDP1 per block"):
        more = kept(how, True) - kept(how, False)
        assert more < 4 * n * n, (how, more)
