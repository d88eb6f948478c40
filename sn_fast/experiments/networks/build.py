"""Networks by the names of their architectures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from contextlib import nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from ... import apply_spectral_norm
from .registry import Architecture, architecture_of
from .regularization import set_weight_decay


def build_network(
    name: str,
    *,
    in_channels: int,
    num_classes: int = 10,
    beta: float = math.inf,
    image_size: int | tuple[int, int] = 28,
    seed: int | None = None,
    weight_decay: float | None = None,
    spectral_norm: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """A network of the paper with its published initial weights: images (B, C, H, W) in, logits (B, classes) out.

    Args:
        name: of the published function: "alexnet", "alexnet_sn", ...; ``network_names()`` lists all.
        in_channels: number of channels of the images.
        num_classes: number of logits.
        beta: the largest spectral norm of every convolution and fully connected layer of a normalised architecture
            ("..._sn"). inf: its layers are PyTorch's plain ones.
        image_size: height and width of the images, in pixels; the paper's are 28 x 28.
        seed: of the initial weights, which are then the same for every beta, and with and without "_sn"; the global
            random state stays as it is. None: from the global random state.
        weight_decay: factor in place of the published one of the layers that the architecture decays ("alexnet_wd":
            all, 5e-4; "..._snl2": the last, 0); for ``parameter_groups``.
        spectral_norm: further keyword arguments of ``apply_spectral_norm``, e.g. {"gradient": "full"}.
        options: of the architecture, in place of the published ones, e.g. ``width=256`` of the MLPs.

    Returns:
        The network, in training mode. Its layers have the published names, its first fully connected layer takes
        its inputs in the published order (height, width, channel).

    Raises:
        ValueError, TypeError: the name is unknown, an argument is out of range, or the images are too small.
    """
    chosen = architecture_of(name)
    image_shape = (_positive("in_channels", in_channels), *_size(image_size))
    num_classes = _positive("num_classes", num_classes)
    _check_beta(chosen, beta)
    kwargs = _options(chosen, options)
    if seed is not None and not _is_integer(seed):
        raise TypeError(f"seed={seed!r} must be an integer or None")
    home = torch.get_default_device()
    # On the CPU a seed gives the same weights wherever the network goes.
    there = home if home.type == "meta" else torch.device("cpu")
    with there, nullcontext() if seed is None else torch.random.fork_rng(devices=()):
        if seed is not None:
            torch.default_generator.manual_seed(int(seed))
        network = chosen.make(image_shape, num_classes, **kwargs)
        chosen.initialize(network)
    network.to(home)
    set_weight_decay(network, chosen, weight_decay)
    if chosen.normalized is None or math.isinf(beta):
        return network
    # reduce=False: u and v have the published shapes, also where the norm is that of a smaller matrix
    given = {**normalized_layers(name), "reduce": False, **dict(spectral_norm or {})}
    example = torch.zeros(1, *image_shape)
    return apply_spectral_norm(network, example, beta=float(beta), **given)


def normalized_layers(name: str) -> dict[str, Any]:
    """Which layers a normalised architecture caps, and by which operator, as keyword arguments of
    ``apply_spectral_norm`` and ``SpectralProjection``; none of an architecture without."""
    chosen = architecture_of(name)
    if chosen.normalized is None:
        return {}
    return {"operator": chosen.normalized, "exclude": chosen.not_normalized}


def _positive(name: str, value: Any) -> int:
    if not _is_integer(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer >= 1")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _size(image_size: Any) -> tuple[int, int]:
    sides = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
    if len(sides) != 2 or not all(_is_integer(side) and side >= 1 for side in sides):
        raise ValueError(f"image_size={image_size!r}: give the pixels of a side, or (height, width)")
    return int(sides[0]), int(sides[1])


def _check_beta(chosen: Architecture, beta: Any) -> None:
    if isinstance(beta, bool) or not isinstance(beta, Real) or not float(beta) > 0:
        raise ValueError(f"beta={beta!r} must be a number above 0; inf leaves the layers as they are")
    if chosen.normalized is None and not math.isinf(beta):
        raise ValueError(
            f"beta={beta!r}: {chosen.name} has no spectral normalisation; leave beta out, or name its _sn twin"
        )


def _options(chosen: Architecture, options: Mapping[str, Any]) -> dict[str, Any]:
    known = list(inspect.signature(chosen.make).parameters)[2:]
    for option in options:
        if option not in known:
            rest = f"its options are {', '.join(known)}" if known else "it has no options"
            raise TypeError(f"build_network: {chosen.name} has no option {option!r}; {rest}")
    return {**chosen.options, **options}
