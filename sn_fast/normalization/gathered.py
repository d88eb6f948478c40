"""What is done outside a forward for weights that FSDP keeps in shards: they are gathered, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from .optimizer_steps import latest
from .parametrization import SpectralNorm, spectral_norms
from .prepared import Pair
from .recompute import keep_no_copies
from .refresh import readable, refresh, restart
from .sharding import gatherings, is_sharded, shards_of
from .tensor_parallel import DistributedSpectralNorm, distributed, refresh_distributed, together


def gathered(
    model: nn.Module,
    caller: str,
    members: Sequence[SpectralNorm] | None = None,
    parallel: Callable[[list[DistributedSpectralNorm]], object] = refresh_distributed,
) -> Iterator[list[Pair]]:
    """Gather the sharded weights below ``model``, one FSDP module at a time; yields the layers with their weights.

    ``parallel`` is called with the tensor-parallel layers among them, of whose weights only their own parts are here.

    Raises:
        RuntimeError: a rank did not come; or the weights are those of a larger model, which alone can gather them.
    """
    waiting = [m for m in spectral_norms(model) if is_away(m)] if members is None else list(members)
    if not waiting:
        return
    for _ in gatherings(model, caller):
        pairs = readable(waiting)
        here = {m for m, _ in pairs}
        parts = [m for m in waiting if isinstance(m, DistributedSpectralNorm) and m.is_at_home()]
        if parts:
            parallel(parts)
        waiting = [m for m in waiting if m not in here and m not in parts]
        if pairs or parts:
            yield pairs
    if waiting:
        raise RuntimeError(
            f"{caller}: the weight of {waiting[0].label()} is sharded by a module above the one given; give the whole "
            "model that fully_shard or FullyShardedDataParallel was called for"
        )


def is_away(member: SpectralNorm) -> bool:
    """Whether a layer's weight is a shard now."""
    if member.geometry is None or member.freezes:
        return False
    weight = member.raw
    if isinstance(member, DistributedSpectralNorm) and not member.sharded:
        return False  # tensor-parallel: never whole
    return (member.sharded or is_sharded(weight)) and not weight.is_meta and not member.is_here(weight)


def start_sharded(model: nn.Module) -> None:
    """Start the state of every layer whose weight is sharded and has memory, on all ranks together."""
    for member in note_sharded(model):
        weight = member.raw
        if member.geometry is not None and not weight.is_meta:  # FSDP1 wants memory for all buffers before it gathers
            assert member.shape is not None
            member.allocate(weight.new_empty(()).expand(member.shape))
    for pairs in gathered(model, "apply_spectral_norm(model)"):
        restart(pairs)
    parallel = distributed(spectral_norms(model))
    refresh_distributed(parallel)


def refresh_sharded(model: nn.Module, caller: str) -> None:
    """Refresh the layers whose weight is sharded, on all ranks together, if weights have moved since the last forward.

    Whether they have is known without communication, and so that all ranks of one program agree: an optimizer has
    taken a step, or a state was loaded.
    """
    members = [m for m in spectral_norms(model) if is_away(m)]
    if any(m.record is None or m.seen_at is not latest() for m in members):
        for pairs in gathered(model, caller, members):
            refresh(pairs, settle=True)
    parallel = distributed(spectral_norms(model))
    if any(m.record is None or m.seen_at is not latest() for m in parallel):
        together(parallel, caller)
        refresh_distributed(parallel)


def update_distributed(model: nn.Module, n_power_iterations: int | None) -> None:
    """Advance the tensor-parallel layers now, on all ranks together."""
    members = distributed(spectral_norms(model))
    if members:
        together(members, "update_spectral_norm(model)")
        advance_distributed(members, n_power_iterations)


def advance_distributed(members: Sequence[DistributedSpectralNorm], n_power_iterations: int | None) -> None:
    """Advance these, whether or not their weights have moved."""
    refresh_distributed(members, force=True, n_power_iterations=n_power_iterations)


def note_sharded(model: nn.Module) -> list[SpectralNorm]:
    """Tell the layers whose weight FSDP shards so; returns those that had not known."""
    homes = [shard.module for shard in shards_of(model)]
    found = [p for home in homes if isinstance(home, ParametrizationList) for p in home if isinstance(p, SpectralNorm)]
    found = [p for p in found if not p.sharded]
    for member in found:
        member.sharded = True
        keep_no_copies(member.module)
    return found
