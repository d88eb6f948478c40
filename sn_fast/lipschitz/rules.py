"""The registry: which rule bounds which module, function or method, and what a rule is given.

A rule is one function. It is registered under module classes and under names; a name stands for the function and the
method of that name, in place or not: "relu" is F.relu, torch.relu, torch.relu_, x.relu() and x.relu_().

    @rule("leaky_relu", nn.LeakyReLU)
    def _leaky_relu(call: Call) -> float:
        # slopes are 1 and negative_slope
        return max(1.0, abs(call.get("negative_slope", 0.01)))

``rule`` registers the constant of the call, in the argument "input" unless it says otherwise. ``joint_rule`` is for
calls where several arguments may depend on the network's input: it combines their bounds into that of the output.
A rule covers a call only if it has looked at every argument that the call has; what it left alone makes the call's
constant infinite.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.exact import is_parametrized_class, why_not_its_class
from .binding import Slot, bind, name_of, replaced, value_at
from .rounding import mul_up, root

_MISSING = object()
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Arguments that change neither the values nor how many they are.
_IDLE = {"inplace", "memory_format", "keepdim", "non_blocking", "sparse_grad", "out", "dtype", "return_indices"}
_IDLE |= {"_stacklevel", "generator", "requires_grad"}


class NotCovered(Exception):
    """A rule does not cover this call; the message says why."""


class BadWeights(ValueError):
    """A weight or a buffer has elements that make every constant meaningless."""


@dataclass(frozen=True)
class Constant:
    """A certified constant, how it was found, and if it is infinite why.

    Attributes:
        picks: of a call that only picks elements of its argument, which ones: numbers from 1 on, 0 for a constant, in
            the shape of the result.
    """

    value: float
    how: str = "closed form"
    reason: str = ""
    picks: Any = None


def no_bound(reason: str) -> Constant:
    """No finite constant is known, or there is none."""
    return Constant(math.inf, "none", reason)


@dataclass
class Call:
    """One call in the graph: a module, a function or a method, with the values of its arguments and its result.

    Attributes:
        name: of the layer, for messages. target: the module, function or name of the method.
        args, kwargs: values, as they were before the call. bounds, keyword_bounds: the same with each value replaced by
            the bound of the map from the network's input to it; 0 for what does not depend on the input.
        origins, keyword_origins: the same with what is known of where each value's elements come from.
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
    origins: tuple[Any, ...] = ()
    keyword_origins: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = self.module is not None or name_of(self.target) is not None
        self.slots: dict[str, Slot] | None = bind(self.target, self.args, self.kwargs) if known else None
        self._read: set[str] = set()
        self._combined: set[str] = set()

    @property
    def module(self) -> nn.Module | None:
        return self.target if isinstance(self.target, nn.Module) else None

    @property
    def kind(self) -> str:
        """Class of the module, or name of the function."""
        return kind_of(self.target)

    @property
    def x(self) -> Any:
        """The argument "input"."""
        return self.get("input")

    @property
    def x_bound(self) -> float:
        """The bound of the argument "input"."""
        return self.bound("input")

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """An argument by its name in PyTorch, or an attribute of the module."""
        if self.slots and name in self.slots:
            self._read.add(name)
            return value_at(self.slots[name], self.args, self.kwargs)
        if self.module is not None and hasattr(self.module, name):
            return getattr(self.module, name)
        if default is _MISSING:
            raise NotCovered(f"{self.kind} without the argument {name!r}: no rule")
        return default

    def bound(self, name: str) -> float:
        """The bound of one argument (of a list: of all of it); 0 if it was not given. The rule answers for it."""
        self._combined.add(name)
        return self._bound(name)

    def put_bound(self, name: str, bound: float) -> None:
        """Set the bound of one argument."""
        assert self.slots is not None
        bounds, keyword_bounds = replaced(self.slots[name], bound, self.bounds, self.keyword_bounds)
        self.bounds, self.keyword_bounds = tuple(bounds), keyword_bounds

    def parts(self, name: str) -> tuple[list[float], list[Any]]:
        """The bounds and the origins of the elements of an argument that is a list."""
        assert self.slots is not None
        self._combined.add(name)
        self._read.add(name)
        bounds = value_at(self.slots[name], self.bounds, self.keyword_bounds)
        origins = value_at(self.slots[name], self.origins, self.keyword_origins)
        return (list(bounds), list(origins)) if isinstance(bounds, (tuple, list)) else ([bounds], [origins])

    def origin(self, name: str) -> Any:
        """What is known of where the elements of an argument come from."""
        if not self.slots or name not in self.slots or not (self.origins or self.keyword_origins):
            return None
        return value_at(self.slots[name], self.origins, self.keyword_origins)

    def allows(self, *names: str) -> None:
        """The rule holds whatever these arguments are, as long as they do not depend on the input."""
        self._read.update(names)

    def ignores(self, *names: str) -> None:
        """The result depends on no more than the shape and dtype of these arguments."""
        self._combined.update(names)
        self._read.update(names)

    def factors(self, *names: str) -> tuple[str, str]:
        """Of two arguments, the one that depends on the input, and the other."""
        first, second = names
        x, other = (first, second) if self._bound(first) else (second, first)
        self._combined.add(x)
        self._read.update(names)
        return x, other

    def all_bounds(self) -> list[float]:
        """The bounds of every argument, nested ones one by one."""
        return [*leaves(self.bounds), *leaves(list(self.keyword_bounds.values()))]

    def other_bounds(self) -> list[float]:
        """The bounds of the arguments other than "input" that depend on the network's input."""
        names = [] if self.slots is None else [n for n in self.slots if n not in ("input", "out")]
        return [b for n in names if (b := self._bound(n))]

    def repeated(self, x: Any) -> float:
        """Norm of the broadcast of ``x`` to the result: every element is copied equally often."""
        if not isinstance(x, Tensor) or not isinstance(self.out, Tensor) or x.numel() == 0:
            return 1.0
        return root(max(self.out.numel() / x.numel(), 1.0))

    def again(self, x: Tensor) -> Any:
        """The result of the same call with another "input"."""
        assert self.slots is not None
        self._read.update(self.slots)
        args, kwargs = replaced(self.slots["input"], x, self.args, self.kwargs)
        if self.module is not None:
            return self.module.forward(*args, **kwargs)
        if isinstance(self.target, str):
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)

    def left_over(self) -> str | None:
        """An argument that the rule has not looked at, or whose bound it has not used."""
        for name in self.slots or {}:
            if name != "out" and self._bound(name) and name not in self._combined:
                return name
            if name not in self._read | _IDLE | {"input"} and name not in self._combined:
                return name
        return None

    def _bound(self, name: str) -> float:
        if not self.slots or name not in self.slots:
            return 0.0
        return max(leaves(value_at(self.slots[name], self.bounds, self.keyword_bounds)), default=0.0)


Rule = Callable[[Call], float | Constant]


class Depends(enum.Enum):
    """Which arguments of a call may depend on the network's input, for its rule to hold."""

    FIRST = "the input alone"
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
    picks: Any = None


_MODULES: dict[type[nn.Module], Entry] = {}
_NAMES: dict[str, Entry] = {}


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
    if call.slots is None:
        return outcome_of(call, no_bound(f"{call.kind}: its arguments fit no signature of it"), 1.0)
    if any(t.is_complex() for t in leaves([call.args, call.kwargs, call.out]) if isinstance(t, Tensor)):
        return outcome_of(call, no_bound(f"{call.kind} of complex numbers: no rule"), 1.0)
    tracked = [b for b in call.all_bounds() if b]
    if entry.depends is Depends.ONE and len(tracked) > 1:
        return outcome_of(call, no_bound("product of two activations: no finite bound"), 1.0)
    if entry.depends is Depends.FIRST:
        call.bound("input")
    try:
        result = entry.function(call)
    except (BadWeights, torch.OutOfMemoryError):
        raise
    except NotCovered as reason:
        result = no_bound(str(reason))
    except Exception as error:  # the rule meets a call that it was not written for
        result = no_bound(f"{call.kind}: its rule does not cover this call ({type(error).__name__})")
    constant = result if isinstance(result, Constant) else Constant(result)
    if math.isfinite(constant.value):
        if entry.depends is Depends.FIRST and call.other_bounds() and call.left_over():
            constant = no_bound(f"{call.kind}: another argument than the first depends on the input")
        elif (name := call.left_over()) is not None:
            constant = no_bound(f"{call.kind}: no rule for its argument {name!r}")
    if constant.reason:  # also if it is another argument that depends on the network's input
        return outcome_of(call, constant, 1.0)
    if entry.depends is not Depends.ANY:
        return outcome_of(call, constant, max(tracked) if entry.depends is Depends.ONE else call.x_bound)
    outcome = outcome_of(call, constant, 1.0)
    return outcome if outcome.reason else replace(outcome, constant=None)


def outcome_of(call: Call, result: float | Constant, bound: float) -> Outcome:
    """The outcome of a constant applied to what has this bound."""
    constant = result if isinstance(result, Constant) else Constant(result)
    if math.isnan(constant.value):
        raise BadWeights(f"layer {call.name!r} ({call.kind}): its weights or buffers have NaN elements")
    after = mul_up(constant.value, bound)
    reason = constant.reason or _unfit_dtype(call, after)
    if reason and not constant.reason:
        return Outcome(math.inf, math.inf, "none", reason)
    return Outcome(constant.value, after, constant.how, reason, constant.picks)


def find(target: Any) -> Entry | None:
    """The rule of a module, function or name of a method."""
    if isinstance(target, nn.Module):
        known = ruled_class(target)
        return None if known is None else _MODULES[known]
    name = name_of(target)
    return None if name is None else _NAMES.get(name)


def ruled_class(module: nn.Module) -> type[nn.Module] | None:
    """The class whose rule holds for this module: its own, or a base class whose computation it inherits whole."""
    ruled = next((base for base in type(module).__mro__ if base in _MODULES), None)
    if ruled is None:
        return None
    known = None if ruled.__module__.startswith("torch.") else ruled
    return ruled if why_not_its_class(module, hooks=False, statistics=False, known=known) is None else None


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


def _unfit_dtype(call: Call, bound: float) -> str:
    """Why a result that depends on the input has no slope, by its dtype."""
    if not (isinstance(call.out, Tensor) and bound) or call.out.dtype in _REAL:
        return ""
    if call.out.is_floating_point() or call.out.is_complex():
        return f"no rule for results of {call.out.dtype}"
    return "integers computed from the input jump: no finite bound"
