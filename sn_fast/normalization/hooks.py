"""Hooks of forwards: one check of all weights per forward of a model, and the sizes of inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..layers.kinds import spatial_axes
from ..layers.linear import chain
from ..layers.observe import input_of
from . import recompute, under_way
from .gathered import note_sharded
from .parametrization import SpectralNorm, spectral_norms, untraced
from .refresh import readable, snapshots, with_ready_weights
from .sharding import is_sharded
from .tensor_parallel import distributed, refresh_distributed


def check_once_per_forward(model: nn.Module) -> None:
    """Have each forward of ``model`` check the weights of all its normalised layers in one call, before the first."""
    if before_forward not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(before_forward)
        model.register_forward_hook(after_forward, always_call=True)


def before_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Refresh what has changed, and hand every layer its state for this forward.

    Layers whose weight cannot be read yet (a shard, offloaded, computed by another hook) check it themselves.
    """
    # Strict export forbids setting attributes; on torch 2.7 to 2.9 it cannot be told from torch.compile.
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return
    members = spectral_norms(module)
    if not torch.compiler.is_compiling():
        if any(map(_may_be_sharded, members)):
            note_sharded(module)
        sharded = [m for m in members if m.sharded]
        if sharded:
            under_way.begin(module, sharded)
    parallel = distributed(members)
    if parallel:
        refresh_distributed(parallel)
        for m in parallel:
            m.__dict__["current"] = m.snapshot(m.raw, vectors=True)
    pairs = readable([m for m in members if not m.is_replica and m.is_plain])
    if not pairs:
        return
    for (member, _), snapshot in zip(pairs, with_ready_weights(pairs, snapshots(pairs))):
        member.__dict__["current"] = snapshot  # without nn.Module's check of every kind of attribute


def _may_be_sharded(member: SpectralNorm) -> bool:
    """Whether the weight is another tensor than before: FSDP's, perhaps."""
    if member.sharded:
        return False
    weight = member.raw
    return is_sharded(weight) or not member._own or weight is not member._own[0]


def after_forward(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
    """The states handed out are those of one forward."""
    if not torch.compiler.is_compiling():
        under_way.end(module)
    for member in spectral_norms(module):
        if member.current is not None and not member.is_replica:
            member.__dict__["current"] = None


def observe_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a convolution: give its parametrization the spatial size of the input."""
    x = input_of(args, kwargs)
    if x is not None and parametrize.is_parametrized(module, "weight"):
        n = spatial_axes(module)
        if torch.jit.is_tracing():  # there sizes are tensors
            with untraced():
                size = tuple(x.shape[-n:])
        else:
            size = tuple(x.shape[-n:])
        for parametrization in chain(module, "weight"):
            if isinstance(parametrization, SpectralNorm):
                parametrization.observe(size)


def remove_hooks(module: nn.Module) -> None:
    """Remove the hooks of a module none of whose layers is normalised any more."""
    for hooks, ours in (
        (module._forward_pre_hooks, (before_forward, observe_input, recompute.enter)),
        (module._forward_hooks, (after_forward, recompute.leave)),
    ):
        for key in [k for k, hook in hooks.items() if hook in ours]:
            hooks.pop(key)
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
