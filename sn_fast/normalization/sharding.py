"""Weights that FSDP keeps in shards: which they are, under which name FSDP gathers them, and all ranks' gatherings.

FSDP remembers the module and the name of every parameter that it gathers, and has no call to change them; a
parametrization renames the parameter. So this file, and no other, writes FSDP's own record of them.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..layers.linear import chain
from ..layers.weighted import is_dtensor
from .meeting import meet


def is_sharded(weight: object) -> bool:
    """Whether a weight is a DTensor, or a part of a flat parameter of FSDP1's."""
    return is_dtensor(weight) or hasattr(weight, "_fsdp_flattened")


_DISTRIBUTES = "torch.distributed.tensor._api"  # the home of the hooks of tensor-parallel layers
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


def own_name(path: str) -> str:
    """A module's name without those of the wrappers that torch.distributed puts around modules."""
    return ".".join([name for name in path.split(".") if name not in _WRAPPERS])


class Shard(ABC):
    """A parameter that FSDP keeps in shards: the whole shape, and where FSDP puts the gathered parameter."""

    module: nn.Module
    name: str
    shape: torch.Size

    @property
    def parameter(self) -> Tensor | None:
        return self.module._parameters.get(self.name)

    @abstractmethod
    def move(self, module: nn.Module, name: str) -> None:
        """Have FSDP put the parameter into ``module`` under ``name`` from now on."""


class _ShardOfFSDP2(Shard):
    def __init__(self, param: Any, module: nn.Module, name: str) -> None:
        self.module, self.name, self.shape = module, name, param._orig_size
        self._info = param._module_info

    def move(self, module: nn.Module, name: str) -> None:
        info = self._info
        if (info.module, info.param_name) == (self.module, self.name):
            info.module, info.param_name = module, name
        else:  # a tied weight, which has several places
            places = list(zip(info.shared_modules, info.shared_param_names))
            i = places.index((self.module, self.name))
            info.shared_modules[i], info.shared_param_names[i] = module, name


class _ShardOfFSDP1(Shard):
    def __init__(self, flat: Any, index: int) -> None:
        self.name, self.module, _ = flat._param_infos[index]
        self.shape = flat._shapes[index]
        self._flat, self._index = flat, index

    def move(self, module: nn.Module, name: str) -> None:
        flat, i = self._flat, self._index
        info = flat._param_infos[i]
        path = f"parametrizations.{info.param_name}"
        moved = type(info)(name, module, f"{info.module_name}.{path}".lstrip("."))
        flat._param_infos = (*flat._param_infos[:i], moved, *flat._param_infos[i + 1 :])
        fqn = f"{flat._fqns[i].removesuffix(info.param_name)}{path}.{name}"
        flat._fqns = (*flat._fqns[:i], fqn, *flat._fqns[i + 1 :])


def shards_of(model: nn.Module, layers: Iterable[nn.Module] | None = None) -> list[Shard]:
    """The parameters that FSDP shards below ``model``; ``layers``: only the weights of these modules."""
    found: list[Shard] = []
    for module in fsdp2_modules(model):
        for param in params_of(module):
            info = param._module_info
            places = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names)]
            found += [_ShardOfFSDP2(param, *place) for place in places]
    for module in _fsdp1_modules(model):
        handle = module._handle
        if handle is not None:
            found += [_ShardOfFSDP1(handle.flat_param, i) for i in range(len(handle.flat_param._param_infos))]
    if layers is None:
        return found
    homes: set[nn.Module] = set()
    for layer in layers:
        homes.add(chain(layer, "weight") if parametrize.is_parametrized(layer, "weight") else layer)
    return [shard for shard in found if shard.module in homes and shard.name in ("weight", "original")]


class _DTensor(Shard):
    """The weight of a tensor-parallel layer: nobody gathers it."""

    def __init__(self, module: nn.Module) -> None:
        weight: Any = module._parameters["weight"]
        self.module, self.name, self.shape = module, "weight", weight.shape

    def move(self, module: nn.Module, name: str) -> None:
        pass


def tensor_parallel_shards(layers: Iterable[nn.Module]) -> list[Shard]:
    """The weights of layers that ``parallelize_module`` was called for, which distributes their inputs by a hook."""
    return [
        _DTensor(layer)
        for layer in layers
        if is_dtensor(layer._parameters.get("weight"))
        and any(getattr(h, "__module__", "") == _DISTRIBUTES for h in layer._forward_pre_hooks.values())
    ]


def fsdp2_modules(model: nn.Module) -> list[Any]:
    """The modules below ``model`` that ``fully_shard`` was called for."""
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)  # imported by nobody: none
    return [] if cls is None else [m for m in model.modules() if isinstance(m, cls)]


def params_of(module: Any) -> list[Any]:
    """FSDP2's records of the parameters that it gathers for a module's forward."""
    state = module._get_fsdp_state()
    groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    return [param for group in groups if group is not None for param in group.fsdp_params]


def modules_in_flat_parameters(model: nn.Module) -> set[nn.Module]:
    """Modules whose parameters FSDP1 keeps in flat ones, without use_orig_params."""
    handles = [m._handle for m in _fsdp1_modules(model)]
    flat = [h.flat_param for h in handles if h is not None and not h._use_orig_params]
    return {info.module for f in flat for info in f._param_infos}


def _fsdp1_modules(model: nn.Module) -> list[Any]:
    cls = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    return [] if cls is None else [m for m in model.modules() if isinstance(m, cls)]


# -- normalising what is sharded already -------------------------------------------------------------------------------


@contextmanager
def whole_on_meta(shards: Sequence[Shard]) -> Iterator[None]:
    """Within this context parameters on meta, of the whole shapes, stand in for the shards.

    At the end the shards take their places, also where a parametrization has moved these.
    """
    found = [shard.parameter for shard in shards]
    for shard, parameter in zip(shards, found):
        assert parameter is not None
        whole = torch.empty(shard.shape, dtype=parameter.dtype, device="meta")
        shard.module._parameters[shard.name] = nn.Parameter(whole, parameter.requires_grad)
    try:
        yield
    finally:
        for shard, parameter in zip(shards, found):
            assert isinstance(parameter, nn.Parameter)
            if parametrize.is_parametrized(shard.module, shard.name):
                home = chain(shard.module, shard.name)
                home._parameters["original"] = parameter
                shard.move(home, "original")
            else:
                shard.module._parameters[shard.name] = parameter


def reshard(model: nn.Module) -> None:
    """Shard what a forward without a backward has left gathered."""
    for module in fsdp2_modules(model):
        module.reshard()
    for module in _fsdp1_modules(model):
        handle = module._handle
        if handle is not None and not handle.is_sharded(handle.flat_param):
            from torch.distributed.fsdp._runtime_utils import _reshard

            _reshard(module, handle, True)


# -- outside a forward -------------------------------------------------------------------------------------------------


def gatherings(model: nn.Module, caller: str) -> Iterator[None]:
    """Gather the sharded parameters below ``model``, those of one FSDP module in each step, on all ranks together.

    Raises:
        RuntimeError: a rank did not come, after ``meeting.PATIENCE`` seconds.
    """
    modules = fsdp2_modules(model)
    ranks: set[int] = {r for m in modules for p in params_of(m) for r in _ranks(p.sharded_param)}
    flat = _fsdp1_modules(model)  # also the root without parameters of its own: FSDP1 has to meet it first
    if not modules and not flat:
        return
    import torch.distributed as dist

    for module in flat:
        ranks |= set(dist.get_process_group_ranks(module.process_group))
    meet(sorted(ranks), caller)
    for module in modules:
        module.unshard()
        try:
            yield
        finally:
            module.reshard()
    for module in flat:
        with type(module).summon_full_params(module, recurse=False, writeback=False):
            yield


def _ranks(weight: Any) -> Iterable[int]:
    ranks: list[int] = weight.device_mesh.mesh.flatten().tolist()
    return ranks
