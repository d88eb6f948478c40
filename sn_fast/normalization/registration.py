"""One weight's parametrization, put on and taken off a module, and what has to hold before."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..layers.kinds import kind_of, nominal_size, spatial_axes, whole_window_size
from ..layers.linear import chain, checked_weight, operator_of, per_axis, raw_weight, why_not_divisible
from ..norms.estimate import operator_norm
from .checks import check_can_be_distributed, check_has_norm
from .data_parallel import watch_wrappers
from .hooks import observe_input, remove_hooks
from .mapped import MappedSpectralNorm
from .options import InputSize, Options
from .parametrization import SpectralNorm
from .replacing import own_class
from .shared_class import share_class
from .tensor_parallel import DistributedSpectralNorm

_LARGEST_COPIES = 1 << 30  # bytes of weights that are kept twice; those of larger models are hashed
_TRIAL_SIZES = (8, 16, 32, 64, 128, 256)  # at which the operator of a layer is looked at before its size is known


class Registered(NamedTuple):
    """A parametrization that is in place, and the input size to start it for (None of a matrix)."""

    parametrization: SpectralNorm
    size: tuple[int, ...] | None
    is_ready: bool
    """Whether it can start: not a convolution whose input size is to be seen yet."""


def register(
    module: nn.Module,
    name: str,
    input_size: InputSize,
    options: Options,
    *,
    hashed: bool = False,
    used_at: Iterable[tuple[int, ...]] = (),
    distributed: bool = False,
    mapped: bool | None = None,
) -> Registered:
    """Put a parametrization on a weight, which is not started.

    Args:
        mapped: what ``check_layers`` has found; None: look.
    """
    check_has_norm(module, name)
    weight = checked_weight(module, name, parametrized=True, on_meta=True)
    kind = kind_of(module) if name == "weight" else None
    as_matrix = options.operator == "reshape" or kind is None or not kind.axes
    if as_matrix and options.operator == "conv" and weight.ndim != 2:
        raise ValueError(
            f"{type(module).__name__}.{name} has shape {tuple(weight.shape)}; its operator is not known: "
            "use operator='reshape' or a supported layer"
        )
    size = None if as_matrix else _input_size(module, weight.ndim - 2, input_size)
    every_size = not as_matrix and input_size == "any" and _depends_on_size(module)
    own = kind.why_not_exact(module) if kind is not None and input_size == "any" else None
    if own is not None:
        raise ValueError(f"input_size='any': {own}, so its map is known at one input size at a time; give that")
    if every_size:
        options = dataclasses.replace(options, bound=True)
    if mapped is None and options.operator == "conv" and kind is not None:
        found = _divisibility(module, size, mapped=not options.bound)
        if found.reason is not None:
            raise ValueError(f"{type(module).__name__} cannot be normalised by its weight: {found.reason}")
        mapped = found.mapped
    registered = kind is not None and kind.of_user and not kind.axes and options.operator == "conv"
    if size is not None or registered:
        # Raises for a size that the layer cannot take, and for a registered operator that is not the layer's map.
        operator_of(module, size)
    known = kind_of(module)
    rows = known.row_dim(weight.shape) if known is not None else 0
    if distributed:
        check_can_be_distributed(module, as_matrix, bool(mapped), options)
    cls = DistributedSpectralNorm if distributed else MappedSpectralNorm if mapped else SpectralNorm
    parametrization = cls(options, as_matrix=as_matrix, matrix_dim=rows, every_size=every_size, hashed=hashed)
    parametrization.train(module.training)
    parametrization.sizes.update(used_at)
    first = not parametrize.is_parametrized(module)
    parametrize.register_parametrization(module, name, parametrization, unsafe=True)
    try:
        if first:
            share_class(module, name)
        parametrization.attach(module, name)
        watch_wrappers()
        if not as_matrix:
            module.register_forward_pre_hook(observe_input, with_kwargs=True)
    except BaseException:  # Ctrl-C, say
        unregister(module, name, keep_raw=True)
        raise
    return Registered(parametrization, size, as_matrix or size is not None)


def unregister(module: nn.Module, name: str, *, keep_raw: bool) -> None:
    """Take all parametrizations of a weight off; with ``keep_raw`` undo ``register``, which leaves others alone."""
    if keep_raw and len(chain(module, name)) > 1:
        chain(module, name).pop(-1)
        remove_hooks(module)
        return
    own_class(module)
    parametrize.remove_parametrizations(module, name, leave_parametrized=not keep_raw)
    remove_hooks(module)


def are_large(modules: Iterable[nn.Module], name: str = "weight") -> bool:
    """Whether copies of these weights, to compare with, would take too much memory."""
    weights = (raw_weight(module, name) for module in modules)
    sizes = (w.nbytes for w in weights if isinstance(w, Tensor) and not nn.parameter.is_lazy(w))
    return sum(sizes) > _LARGEST_COPIES


def check_layers(layers: Mapping[str, tuple[nn.Module, tuple[int, ...] | None]], *, mapped: bool) -> dict[str, bool]:
    """Raise where dividing the weights does not divide the layers' maps, naming all such layers.

    Args:
        mapped: whether the weight of a registered operator may be a linear function of the parameter.

    Returns:
        Of each layer whether it is one.
    """
    found = {name: _divisibility(module, size, mapped=mapped) for name, (module, size) in layers.items()}
    refused = {name: reason for name, (reason, _) in found.items() if reason is not None}
    if refused:
        names = ", ".join(map(repr, refused))
        pattern = "^({})$".format("|".join(map(re.escape, refused)))
        many = len(refused) > 1
        raise ValueError(
            f"layer{'s' * many} {names} cannot be normalised by {'their weights' if many else 'its weight'}: "
            f"{next(iter(refused.values()))}{' (the first; the others are alike)' * many}. "
            f"Leave {'them' if many else 'it'} alone with exclude={pattern!r}"
        )
    return {name: is_mapped for name, (_, is_mapped) in found.items()}


class _Divisibility(NamedTuple):
    """Why dividing a parameter does not divide the layer's map (None: it does), and whether it is mapped."""

    reason: str | None
    mapped: bool


def _divisibility(module: nn.Module, size: Sequence[int] | None, *, mapped: bool) -> _Divisibility:
    reason = _why_not_divisible(module, size, mapped=False)
    if reason is None or not mapped:
        return _Divisibility(reason, False)
    reason = _why_not_divisible(module, size, mapped=True)
    return _Divisibility(reason, reason is None)


def _why_not_divisible(module: nn.Module, size: Sequence[int] | None, *, mapped: bool) -> str | None:
    weight = raw_weight(module)
    kind = kind_of(module)
    if kind is None or not isinstance(weight, nn.Parameter) or is_lazy(weight):
        return None
    axes = spatial_axes(module)
    sizes = [size] if size is not None or not axes else [(n,) * axes for n in _TRIAL_SIZES]
    reason = None
    for trial in sizes:
        reason = why_not_divisible(module, weight, trial, mapped=mapped)
        if reason is None:
            break
    return reason


def _input_size(module: nn.Module, n: int, input_size: InputSize) -> tuple[int, ...] | None:
    if input_size is None:
        return None
    if not isinstance(input_size, str):
        return per_axis("input_size", input_size, n, minimum=1)
    if input_size != "any":
        raise ValueError(f"input_size={input_size!r}: give a spatial size such as (32, 32), None or 'any'")
    return nominal_size(module)


def _depends_on_size(module: nn.Module) -> bool:
    """Whether the norm of a convolution can differ between input sizes."""
    return any(size is None for size in whole_window_size(module))


def size_of_largest_norm(module: nn.Module, sizes: list[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Of the sizes at which a layer is used, the one with the largest norm."""
    distinct = list(dict.fromkeys(sizes))
    if len(distinct) <= 1:
        return distinct[0] if distinct else None
    kind = kind_of(module)
    weight = raw_weight(module)
    nothing_to_measure = isinstance(weight, Tensor) and weight.is_meta
    if nothing_to_measure or (
        getattr(module, "padding_mode", "zeros") == "zeros" and not (kind is not None and kind.of_user)
    ):
        return tuple(map(max, zip(*distinct)))  # the norm grows with the size
    norms = [operator_norm(operator_of(module, size), method="lanczos", tol=1e-3) for size in distinct]
    return distinct[max(range(len(norms)), key=lambda i: float(norms[i]))]
