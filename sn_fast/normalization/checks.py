"""Parameters that have no spectral norm to divide by, and what to do instead."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..layers.linear import chain, raw_weight
from .options import Options
from .sharding import Shard, is_sharded, modules_in_flat_parameters, own_name

_SAME_WEIGHT = 1e-2  # of its norm: by less differ normalised weights whose sigmas were iterated apart

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


_FLAT = (
    "FullyShardedDataParallel keeps it in a flat parameter of its own, with no name that a parametrization could take; "
    "pass use_orig_params=True, or normalise first and wrap then"
)
_IN_A_MODEL = (
    "call sn_fast.apply_spectral_norm with the whole model that fully_shard or FullyShardedDataParallel was called "
    "for, or normalise first and shard then"
)


def check_not_flat(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raise for a layer whose weight FSDP1 keeps in a flat parameter, without a name of its own."""
    flat = modules_in_flat_parameters(model)
    for name, module in layers.items():
        if module in flat:
            raise ValueError(f"layer {name!r} is sharded already: {_FLAT}")


def check_can_run(shards: Iterable[Shard]) -> None:
    """Raise where the forward of a sharded model cannot run, which tells at what sizes convolutions are used."""
    if any(shard.parameter is not None and shard.parameter.is_meta for shard in shards):
        raise ValueError(
            "the model is sharded and on meta, so that no forward can tell the input sizes of its convolutions; "
            "normalise first, and shard then, or load the weights before"
        )


def check_can_be_distributed(module: nn.Module, as_matrix: bool, mapped: bool, options: Options) -> None:
    """Raise for what a tensor-parallel layer has not."""
    label = type(module).__name__
    if not as_matrix or mapped or module._parameters["weight"].ndim != 2:  # type: ignore[union-attr]
        raise ValueError(f"{label} is tensor-parallel; of such layers matrices are normalised (Linear, Embedding)")
    if options.full or options.bound or options.tol is not None:
        option = "gradient='full'" if options.full else "bound=True" if options.bound else f"tol={options.tol:g}"
        raise ValueError(f"{option} needs the whole weight, and {label} is tensor-parallel; leave it out")


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
    if is_sharded(weight):
        raise ValueError(f"{label} is sharded already: {_IN_A_MODEL}")
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


def check_none_shares(model: nn.Module, found: Iterable[tuple[str, nn.Module, str]]) -> None:
    """Raise where a normalised weight, in the place of its raw one, would change another layer that has that too.

    ``found``: (path, module, name of the parameter) of the weights below ``model`` whose normalisation is removed.
    """
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, home in model.named_modules():
        for key, parameter in home._parameters.items():
            places.setdefault(id(parameter), []).append((f"{own_name(path)}.{key}".lstrip("."), home))
    removed: dict[nn.Module, tuple[str, nn.Module, str]] = {}
    for path, module, name in found:
        removed[chain(module, name)] = f"{path}.{name}".lstrip("."), module, name
    for holder, (label, module, name) in removed.items():
        raw = holder._parameters.get("original")
        for other, home in places[id(raw)] if raw is not None else ():
            if home is holder:
                continue
            with torch.no_grad():
                here, there = getattr(module, name), raw
                if home in removed:  # then its own removal leaves it as it is
                    other, twin, parameter_name = removed[home]
                    there = getattr(twin, parameter_name)
                if torch.linalg.vector_norm(here - there) <= _SAME_WEIGHT * torch.linalg.vector_norm(there):
                    continue
            raise ValueError(
                f"remove_spectral_norm: {label!r} and {other!r} are one parameter, and the normalised weight in its "
                "place would change the other layer; untie them first: give one layer an nn.Parameter of its own, a "
                "copy of the raw weight"
            )
