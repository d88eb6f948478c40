"""Parameters that have no spectral norm to divide by, and what to do instead."""

from __future__ import annotations

import sys

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..layers.linear import raw_weight

# Older ways to compute a weight before each forward: the entries that tell, what it is, and how it is undone.
_COMPUTED = (
    (("_orig", "_mask"), "pruned before each forward", "torch.nn.utils.prune.remove(module, {!r})"),
    (
        ("_orig", "_u"),
        "made by torch.nn.utils.spectral_norm before each forward (replace=True replaces it)",
        "torch.nn.utils.remove_spectral_norm(module, {!r})",
    ),
    (
        ("_g", "_v"),
        "made by torch.nn.utils.weight_norm before each forward",
        "torch.nn.utils.remove_weight_norm(module, {!r})",
    ),
)


_BEFORE_SHARDING = (
    "sharding keeps the parameters under the names that they have then, and a parametrization renames them; normalise "
    "first, then call fully_shard, FullyShardedDataParallel or parallelize_module"
)


def check_not_sharded(model: nn.Module) -> None:
    """Raise for a model that FSDP or another of torch.distributed's wrappers has sharded."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # nothing is sharded by what was not imported
    wrapper = getattr(fsdp, "FullyShardedDataParallel", ())
    for name, module in model.named_modules():
        if isinstance(module, wrapper):
            raise ValueError(f"the model is sharded already, by {type(module).__name__}: {_BEFORE_SHARDING}")
        for key, parameter in module._parameters.items():
            if _is_sharded(parameter):
                label = f"{name}.{key}".lstrip(".")
                raise ValueError(f"the model is sharded already, parameter {label!r} is: {_BEFORE_SHARDING}")


def _is_sharded(weight: object) -> bool:
    """Whether a weight is a DTensor, or a part of a flat parameter of FSDP's."""
    return (hasattr(weight, "device_mesh") and hasattr(weight, "placements")) or hasattr(weight, "_fsdp_flattened")


def check_has_norm(module: nn.Module, name: str) -> None:
    """Raise for a parameter without a spectral norm, saying what to do instead."""
    if not isinstance(module, nn.Module):
        return
    label = f"{parametrize.type_before_parametrizations(module).__name__}.{name}"
    entries = {*module._parameters, *module._buffers}
    for endings, what, undo in _COMPUTED:
        if name not in entries and all(name + ending in entries for ending in endings):
            raise ValueError(f"{label} is {what}; undo that first, with {undo.format(name)}")
    weight = raw_weight(module, name)
    if _is_sharded(weight):
        raise ValueError(f"{label} is sharded already: {_BEFORE_SHARDING}")
    if not isinstance(weight, nn.Parameter) or is_lazy(weight):
        return
    if weight.ndim not in range(2, 6):
        raise ValueError(
            f"{label} has no spectral norm: weight has shape {tuple(weight.shape)}, expected are 2 to 5 dimensions; "
            "give the name of such a weight with name=, or leave this one as it is (exclude= of apply_spectral_norm)"
        )
    if weight.is_complex():
        raise TypeError(
            f"{label} cannot be normalised: weight has dtype {weight.dtype}; real floating-point weights are "
            "supported, torch.nn.utils.parametrizations.spectral_norm takes complex ones"
        )
