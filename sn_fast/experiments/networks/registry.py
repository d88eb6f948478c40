"""The registry of architectures: a name, how its layers are made, and what regularises them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from .initial import xavier_uniform

# (image shape (C, H, W), number of classes, further options by keyword) -> the network with its layers unnormalised.
Make = Callable[..., nn.Module]
MakeT = TypeVar("MakeT", bound=Make)


@dataclass(frozen=True)
class Architecture:
    """One published function of the paper's models, or one of your own.

    Attributes:
        name: of the published function, e.g. "alexnet_sn".
        make: (image_shape, num_classes, **options) -> the network.
        options: given to ``make`` in every network of this name; ``build_network`` may replace them.
        normalized: how a finite beta caps the layers: "conv", by the norm of the true linear map; "reshape", a
            convolution by the norm of its reshaped kernel; None, not at all.
        not_normalized: regular expression on the names of layers that stay as they are.
        weight_decay: {regular expression on the names of layers: factor}; the loss gains factor / 2 * ||W||^2, once.
        initialize: sets the initial weights, after the network is made.
    """

    name: str
    make: Make
    options: Mapping[str, Any] = field(default_factory=dict)
    normalized: str | None = None
    not_normalized: str | None = None
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    initialize: Callable[[nn.Module], None] = xavier_uniform


_ARCHITECTURES: dict[str, Architecture] = {}


def architecture(
    name: str,
    *,
    normalized: str | None = None,
    not_normalized: str | None = None,
    weight_decay: Mapping[str, float] | None = None,
    initialize: Callable[[nn.Module], None] = xavier_uniform,
    **options: Any,
) -> Callable[[MakeT], MakeT]:
    """Register a function (image_shape, num_classes, **options) -> nn.Module as the architecture of this name.

    >>> @architecture("linear", bias=True)
    ... @architecture("linear_sn", bias=True, normalized="conv")
    ... def linear(image_shape, num_classes, *, bias):
    ...     layers = {"flatten": nn.Flatten(), "fc": nn.Linear(math.prod(image_shape), num_classes, bias)}
    ...     return nn.Sequential(OrderedDict(layers))

    Args:
        normalized, not_normalized, weight_decay, initialize: see ``Architecture``.
        options: keyword arguments of the function.

    Raises:
        ValueError: the name is taken, or ``normalized`` is unknown.
    """
    if normalized not in (None, "conv", "reshape"):
        raise ValueError(f"normalized={normalized!r}: give 'conv', 'reshape' or None")

    def add(make: MakeT) -> MakeT:
        if name in _ARCHITECTURES:
            raise ValueError(f"an architecture {name!r} is registered already; choose another name")
        _ARCHITECTURES[name] = Architecture(
            name, make, options, normalized, not_normalized, dict(weight_decay or {}), initialize
        )
        return make

    return add


def network_names() -> list[str]:
    """The names that ``build_network`` takes."""
    return sorted(_ARCHITECTURES)


def architecture_of(name: str) -> Architecture:
    """The architecture of this name.

    Raises:
        ValueError: there is none; the message names the nearest ones.
    """
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        near = difflib.get_close_matches(str(name), _ARCHITECTURES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(network_names())}"
        raise ValueError(f"network {name!r} is unknown; {hint}")
    return _ARCHITECTURES[name]
