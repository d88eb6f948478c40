"""DistributedDataParallel: the states of rank 0 are sent with its weights, when a model is wrapped, and never after.

DDP sends the buffers of rank 0 before each forward. Of u, v and sigma that is of no use, for they follow from weights
that are equal on all ranks; it costs 17 MB a forward on ResNet-50; and it would part the ranks: a rank 0 that has
evaluated alone is one iteration ahead, and the others would make that iteration once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from .parametrization import SpectralNorm, spectral_norms
from .refresh import refresh_model
from .state import BUFFERS

_watching = False


def watch_wrappers() -> None:
    """From the first call on, keep the states of models that are wrapped out of DDP's broadcasts."""
    global _watching
    if not _watching:
        _watching = True
        register_module_module_registration_hook(_on_registration)


def _on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if name == "module" and child is not None and isinstance(parent, DistributedDataParallel):
        members = spectral_norms(child)
        if members:
            refresh_model(members)  # what rank 0 is about to send belongs to the weights that it sends
            for member in members:
                member.inherit()
            parent.register_forward_pre_hook(_before_forward)


@torch._disable_dynamo
def _before_forward(ddp: nn.Module, args: tuple[Any, ...]) -> None:
    """Before the first forward of a wrapper: take what rank 0 has sent, and leave the states out from now on."""
    leave_out(ddp)
    refresh_model(spectral_norms(ddp))
    for key in [k for k, hook in ddp._forward_pre_hooks.items() if hook is _before_forward]:
        del ddp._forward_pre_hooks[key]


def leave_out(model: nn.Module) -> None:
    """Keep the states out of the broadcasts of all wrappers in ``model``."""
    for wrapper in model.modules():
        if isinstance(wrapper, DistributedDataParallel):
            found = wrapper.module.named_modules()
            names = {f"{path}.{b}" for path, member in found if isinstance(member, SpectralNorm) for b in BUFFERS}
            wrapper.parameters_to_ignore |= names
            wrapper._assign_modules_buffers()  # nothing is sent where no buffer is left
