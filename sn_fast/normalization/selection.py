"""Which layers of a model are normalised, and by which beta."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..layers.kinds import kind_of
from ..layers.observe import check_is_no_shape
from .sharding import own_name


def chosen_layers(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...] | Mapping[str, Any],
    include: type[nn.Module] | Sequence[type[nn.Module]] | None,
    exclude: str | None,
) -> dict[str, nn.Module]:
    """The layers that the arguments of ``apply_spectral_norm`` choose, by name; raises if there is none."""
    check_is_no_shape(example_input)
    if not isinstance(example_input, (Tensor, tuple, Mapping)):
        raise TypeError(
            f"example_input is a {type(example_input).__name__}; give a tensor, a tuple of arguments, or a dict of "
            "keyword arguments"
        )
    classes = included_classes(include)
    excluded = compiled_pattern("exclude", exclude) if exclude else None
    layers = {
        name: module
        for name, module in [(own_name(path), module) for path, module in model.named_modules()]
        if is_chosen(module, classes) and not (excluded and excluded.search(name))
    }
    if not layers:
        raise ValueError(f"no layer to normalise: include={include!r}, exclude={exclude!r} leave none of the model's")
    return layers


def betas_of(beta: float | Mapping[str, float], layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Of each layer its beta: the one given, or that of the first pattern that its name matches."""
    if not isinstance(beta, Mapping):
        return dict.fromkeys(layers, beta)
    patterns = [(compiled_pattern("beta", text), value) for text, value in beta.items()]
    for pattern, _ in patterns:
        if not any(map(pattern.search, layers)):
            raise ValueError(f"beta: pattern {pattern.pattern!r} matches no layer; they are {', '.join(layers)}")
    betas = {name: next((b for pattern, b in patterns if pattern.search(name)), None) for name in layers}
    missing = [name for name, b in betas.items() if b is None]
    if missing:
        raise ValueError(f"beta: no pattern matches layer {missing[0]!r}; add one, e.g. '.*' as the last")
    return {name: b for name, b in betas.items() if b is not None}


def included_classes(include: type[nn.Module] | Sequence[type[nn.Module]] | None) -> tuple[type[nn.Module], ...] | None:
    """The classes that ``include`` names; None: those that are normalised by default."""
    if include is None:
        return None
    classes = (include,) if isinstance(include, type) else tuple(include)
    if not all(isinstance(c, type) for c in classes):
        raise TypeError(f"include={include!r} must be a module class, or several")
    return classes


def is_chosen(module: nn.Module, classes: tuple[type[nn.Module], ...] | None) -> bool:
    """Whether a module is of these classes, or, where there are none, of a kind that is normalised by default."""
    if classes is not None:
        return isinstance(module, classes)
    kind = kind_of(module)
    return kind is not None and kind.default


def compiled_pattern(argument: str, text: str) -> re.Pattern[str]:
    """A regular expression that a user gave as ``argument``."""
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise ValueError(f"{argument}: {text!r} is not a regular expression ({error})") from None
