"""The registry: which rule bounds which module, function or method, and what a rule is given.

A rule is one function. It is registered under module classes and under names; a name stands for the function and the
method of that name, in place or not: "relu" is F.relu, torch.relu, torch.relu_, x.relu() and x.relu_().

    @rule("leaky_relu", nn.LeakyReLU)
    def _leaky_relu(call: Call) -> float:
        # slopes are 1 and negative_slope
        return max(1.0, abs(call.get("negative_slope", 1, 0.01)))

``rule`` registers the constant of the call, in its first argument unless it says otherwise. ``joint_rule`` is for calls
where several arguments may depend on the network's input: it combines their bounds into that of the output.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from .rounding import root, times

_MISSING = object()


@dataclass(frozen=True)
class Constant:
    """A certified constant, how it was found, and if it is infinite why."""

    value: float
    how: str = "closed form"
    reason: str = ""


def no_bound(reason: str) -> Constant:
    """No finite constant is known, or there is none."""
    return Constant(math.inf, "none", reason)


@dataclass
class Call:
    """One call in the graph: a module, a function or a method, with the values of its arguments and its result.

    Attributes:
        name: of the layer, for messages. target: the module, function or name of the method.
        args, kwargs: values. bounds, keyword_bounds: the same with each value replaced by the bound of the map from
            the network's input to it; 0 for what does not depend on the input.
        out: value of the result.
        cache: certificates already computed in this run.
    """

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    bounds: tuple[Any, ...]
    keyword_bounds: dict[str, Any]
    out: Any
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module | None:
        return self.target if isinstance(self.target, nn.Module) else None

    @property
    def kind(self) -> str:
        """Class of the module, or name of the function."""
        return kind_of(self.target)

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()), None)

    @property
    def x_bound(self) -> float:
        """The bound of the first argument (of a list: of all of it)."""
        first = self.bounds[0] if self.bounds else next(iter(self.keyword_bounds.values()), 0.0)
        return max(leaves(first), default=0.0)

    def get(self, name: str, position: int, default: Any = _MISSING) -> Any:
        """A setting: attribute of the module, or argument of the function by name or position."""
        if self.module is not None:
            return getattr(self.module, name) if default is _MISSING else getattr(self.module, name, default)
        return _argument(self.args, self.kwargs, name, position, default)

    def bound(self, name: str, position: int) -> float:
        """The bound of one argument of a function."""
        return max(leaves(_argument(self.bounds, self.keyword_bounds, name, position, 0.0)), default=0.0)

    def all_bounds(self) -> list[float]:
        """The bounds of every argument, nested ones one by one."""
        return [*leaves(self.bounds), *leaves(list(self.keyword_bounds.values()))]

    def other_bounds(self) -> list[float]:
        """The bounds of every argument but the first."""
        if self.bounds:
            return [*leaves(self.bounds[1:]), *leaves(list(self.keyword_bounds.values()))]
        return list(leaves(list(self.keyword_bounds.values())[1:]))

    def repeated(self, x: Any) -> float:
        """Norm of the broadcast of ``x`` to the result: every element is copied equally often."""
        if not isinstance(x, Tensor) or not isinstance(self.out, Tensor) or x.numel() == 0:
            return 1.0
        return root(max(self.out.numel() / x.numel(), 1.0))


Rule = Callable[[Call], float | Constant]


class Depends(enum.Enum):
    """Which arguments of a call may depend on the network's input, for its rule to hold."""

    FIRST = "the first alone"
    SHAPES = "the first, and of the others only the shape is used"
    ONE = "any one"
    ANY = "any number: the rule returns the bound of the output, not the constant of the call"


@dataclass(frozen=True)
class Entry:
    """A registered rule."""

    function: Rule
    depends: Depends


@dataclass(frozen=True)
class Outcome:
    """What a call does to the bound: its own constant (None where several bounds combine), and the bound after it."""

    constant: float | None
    bound: float
    how: str
    reason: str = ""


_MODULES: dict[type[nn.Module], Entry] = {}
_NAMES: dict[str, Entry] = {}
# Overriding these does not change what a layer computes from its weights.
_HARMLESS = {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__repr__", "extra_repr"}
_HARMLESS |= {"reset_parameters", "__constants__", "__firstlineno__", "__static_attributes__"}


def rule(*targets: str | type[nn.Module], depends: Depends = Depends.FIRST) -> Callable[[Rule], Rule]:
    """Register the constant of a call."""

    def add(function: Rule) -> Rule:
        for target in targets:
            registry: dict[Any, Entry] = _NAMES if isinstance(target, str) else _MODULES
            assert target not in registry, f"{target} has a rule already"
            registry[target] = Entry(function, depends)
        return function

    return add


def joint_rule(*targets: str | type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register how the bounds of all arguments combine into that of the output."""
    return rule(*targets, depends=Depends.ANY)


def apply_rule(call: Call) -> Outcome:
    """The bound after a call of which at least one argument depends on the input.

    Raises:
        ValueError: a constant is NaN, as NaN weights make it.
    """
    entry = find(call.target)
    if entry is None:
        return outcome_of(call, no_bound(f"no rule for {call.kind}"), 1.0)
    bounds = call.all_bounds()
    if entry.depends is Depends.FIRST and any(call.other_bounds()):
        return outcome_of(call, no_bound(f"{call.kind}: another argument than the first depends on the input"), 1.0)
    if entry.depends is Depends.ONE and sum(b > 0 for b in bounds) > 1:
        return outcome_of(call, no_bound("product of two activations: no finite bound"), 1.0)
    result = entry.function(call)
    if entry.depends is not Depends.ANY:
        return outcome_of(call, result, max(bounds) if entry.depends is Depends.ONE else call.x_bound)
    constant = result if isinstance(result, Constant) else Constant(result)
    outcome = outcome_of(call, constant, 1.0)
    return outcome if constant.reason else replace(outcome, constant=None)


def outcome_of(call: Call, result: float | Constant, bound: float) -> Outcome:
    """The outcome of a constant applied to what has this bound."""
    constant = result if isinstance(result, Constant) else Constant(result)
    if math.isnan(constant.value):
        raise ValueError(f"layer {call.name!r} ({call.kind}): its weights or buffers have NaN elements")
    return Outcome(constant.value, times(constant.value, bound), constant.how, constant.reason)


def find(target: Any) -> Entry | None:
    """The rule of a module, function or name of a method."""
    if isinstance(target, nn.Module):
        known = ruled_class(target)
        return None if known is None else _MODULES[known]
    if isinstance(target, str):
        return _NAMES.get(target.strip("_"))
    package = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    name = getattr(target, "__name__", "").strip("_")
    if package in ("torch", "_operator", "builtins"):
        return _NAMES.get(name)
    return _NAMES.get(f"{package}.{name}")


def ruled_class(module: nn.Module) -> type[nn.Module] | None:
    """The class whose rule holds for this module: its own, or a base class whose computation it inherits whole."""
    own: set[str] = set()
    for base in type(module).__mro__:
        if base in _MODULES:
            inherited = {name for c in base.__mro__ for name in vars(c) if c is not object}
            return base if not (own & inherited) - _HARMLESS else None
        if not is_parametrized_class(base):
            own |= set(vars(base))
    return None


def is_parametrized_class(cls: type) -> bool:
    """Whether torch.nn.utils.parametrize made this class: it only adds properties for the weights in use."""
    return cls.__module__ == "torch.nn.utils.parametrize" and cls.__name__.startswith("Parametrized")


def kind_of(target: Any) -> str:
    """Name of a module's class (that below the parametrizations), of a function or of a method."""
    if isinstance(target, nn.Module):
        return next(c for c in type(target).__mro__ if not is_parametrized_class(c)).__name__
    return target if isinstance(target, str) else getattr(target, "__name__", repr(target)).strip("_")


def leaves(nested: Any) -> Iterator[Any]:
    """The elements of nested tuples, lists, dicts and slices, None left out."""
    if isinstance(nested, dict):
        nested = list(nested.values())
    elif isinstance(nested, slice):
        nested = [nested.start, nested.stop, nested.step]
    if isinstance(nested, (tuple, list)):
        for element in nested:
            yield from leaves(element)
    elif nested is not None:
        yield nested


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, position: int, default: Any) -> Any:
    if name in kwargs:
        return kwargs[name]
    if position < len(args):
        return args[position]
    if default is _MISSING:
        raise ValueError(f"argument {name!r} is missing")
    return default
