"""Values that are linear on either side of a switch: where the branch that is taken depends on the input.

``x * (s <= 0) + y * (s > 0)`` jumps at s = 0 unless x and y agree there. Elementwise sums, products with constants,
comparisons with such sums and choices by them are followed as exact linear forms (Householder activations, and other
activations written with masks). A value is bounded if its forms agree wherever the switch is zero, as polynomials in
the constants: then it is continuous, and no steeper than the steeper side.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from .binding import name_of, value_at
from .coefficients import Coefficient, TooLong
from .origins import Origin, Piece, joint_bound
from .rounding import mul_up, next_up, root
from .rules import Call, NotCovered

# A linear form: the coefficient of each source (a value, by its number), and under None the constant summand.
Form = dict[Any, Coefficient]

_MOST_SOURCES = 8
_SUMS = {"add": 1, "iadd": 1, "sub": -1, "isub": -1, "subtract": -1, "rsub": -1}
_PRODUCTS = ("mul", "multiply", "imul")
_QUOTIENTS = ("truediv", "div", "divide", "itruediv")
# Where a comparison holds: below, at and above zero of the difference.
_COMPARISONS = {"lt": (1, 0, 0), "le": (1, 1, 0), "gt": (0, 0, 1), "ge": (0, 1, 1), "eq": (0, 1, 0), "ne": (1, 0, 1)}
_KINKS = {"relu": 0, "abs": -1, "absolute": -1}  # the slope below zero of those that have 1 above
_CASTS = ("float", "double", "half", "bfloat16", "to", "type", "type_as")
_RESHAPES = ("view", "reshape", "unsqueeze", "getitem", "permute", "transpose", "expand", "flatten", "squeeze")
_ZERO, _UNIT = Coefficient({}), Coefficient.number(1)


@dataclass(frozen=True)
class Pieces:
    """A value's forms where the switch is below, at and above zero; without a switch they are one."""

    forms: tuple[Form, Form, Form]
    switch: Form | None = None

    @property
    def is_indicator(self) -> bool:
        return all(f in ({}, {None: _UNIT}) for f in self.forms)


class PiecewiseLinear:
    """The forms of the values of a graph, as it runs."""

    def __init__(self) -> None:
        self._pieces: dict[fx.Node, Pieces] = {}
        self._constants: dict[fx.Node, Coefficient] = {}
        self._angles: dict[fx.Node, dict[int, Fraction]] = {}
        self._tensors: list[Tensor] = []  # different ones; their places are their numbers
        self._numbers: dict[object, int] = {}  # of the sources, by where their elements come from
        self._sources: list[tuple[float, Any]] = []  # their bounds and origins
        self._epoch = 0  # how often a tensor was overwritten
        self.joined: set[fx.Node] = set()  # values that are bounded by their forms

    def forget(self) -> None:
        """A tensor was overwritten: what was known of values may be wrong now."""
        self._epoch += 1
        self._pieces.clear()
        self._constants.clear()
        self._angles.clear()
        self._numbers.clear()

    def inner(self, graph: fx.Graph) -> set[fx.Node]:
        """The values that are steps on the way to those that are bounded by their forms, and no more."""
        found: set[fx.Node] = set()
        for n in reversed(graph.nodes):
            if n in self._pieces and n not in self.joined and n.users and found | self.joined >= set(n.users):
                found.add(n)
        return found

    def constant(self, n: fx.Node, value: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Follow a value that does not depend on the network's input."""
        if n.op not in ("call_function", "call_method") or not isinstance(value, Tensor):
            return
        with contextlib.suppress(TooLong, NotCovered):
            self._follow_constant(n, Call(n.name, n.target, tuple(args), kwargs, (), {}, value))

    def follow(self, n: fx.Node, call: Call) -> Piece | None:
        """Follow a value that depends on it. Returns its origin, with its bound, if its forms are continuous."""
        if n.op not in ("call_function", "call_method") or not isinstance(call.out, Tensor) or call.slots is None:
            return None
        try:
            pieces = self._combined(n, call)
            if pieces is None:
                return None
            self._pieces[n] = pieces
            if pieces.switch is None or math.isinf(bound := self._joint([pieces])):
                return None
        except (TooLong, NotCovered):
            return None
        self.joined.add(n)
        switch = frozenset((source, c.key()) for source, c in pieces.switch.items())
        return Piece(object(), bound, call.out.numel(), (self._epoch, switch), pieces, self._joint)

    # -- constants ----------------------------------------------------------------------------------------------------

    def _follow_constant(self, n: fx.Node, call: Call) -> None:
        name = name_of(call.target)
        if call.slots is None or not call.out.is_floating_point():
            return
        x = _argument(n, call, "input")
        if name in _RESHAPES and isinstance(x, fx.Node) and (x in self._constants or x in self._angles):
            self._reshape(n, call, x)
        elif name == "neg":
            self._scale(n, x, Fraction(-1), call)
        elif name in ("add", "sub") and len(call.slots) == 2 and all(isinstance(a, fx.Node) for a in n.args):
            x, other = (_argument(n, call, k) for k in ("input", "other"))
            sign = Fraction(_SUMS[name])
            a, b = (self._angle(m, call.get(k)) for m, k in ((x, "input"), (other, "other")))
            self._angles[n] = {i: a.get(i, Fraction(0)) + sign * b.get(i, Fraction(0)) for i in {**a, **b}}
        elif name in _PRODUCTS or name in _QUOTIENTS:
            other = _argument(n, call, "other")
            x, factor = (x, other) if isinstance(x, fx.Node) else (other, x)
            if _is_number(factor) and (name in _PRODUCTS or (x is not other and factor != 0)):
                factor = Fraction(factor)
                self._scale(n, x, factor if name in _PRODUCTS else 1 / factor, call)
            elif name in _PRODUCTS and isinstance(factor, fx.Node):
                values = (call.get("input"), call.get("other"))
                self._constants[n] = operator.mul(*(self._coefficient(m, v) for m, v in zip((x, factor), values)))
        elif name in ("sin", "cos") and isinstance(x, fx.Node):
            angle = self._angle(x, call.x)
            self._constants[n] = Coefficient.sine(angle) if name == "sin" else Coefficient.cosine(angle)

    def _scale(self, n: fx.Node, x: fx.Node, factor: Fraction, call: Call) -> None:
        value = call.x if isinstance(call.x, Tensor) else call.get("other")
        self._angles[n] = {i: k * factor for i, k in self._angle(x, value).items()}
        self._constants[n] = self._coefficient(x, value) * Coefficient.number(factor)

    def _reshape(self, n: fx.Node, call: Call, x: fx.Node) -> None:
        """A function of elements, of moved elements."""
        known = self._angles.get(x, {}).keys() | (self._constants[x].tensors() if x in self._constants else set())
        if any(self._tensors[i].shape != call.x.shape for i in known):
            return
        names = {i: self._number(call.again(self._tensors[i])) for i in known}
        if len(set(names.values())) < len(names):
            return
        if x in self._angles:
            self._angles[n] = {names[i]: k for i, k in self._angles[x].items()}
        if x in self._constants:
            self._constants[n] = self._constants[x].renamed(names)

    def _angle(self, n: fx.Node, value: Tensor) -> dict[int, Fraction]:
        return self._angles[n] if n in self._angles else {self._number(value): Fraction(1)}

    def _coefficient(self, n: fx.Node, value: Tensor) -> Coefficient:
        return self._constants[n] if n in self._constants else Coefficient.tensor(self._number(value))

    def _number(self, value: Tensor) -> int:
        """The number of a constant: equal ones have the same."""
        for i, known in enumerate(self._tensors):
            if known.shape == value.shape and known.dtype == value.dtype and torch.equal(known, value):
                return i
        self._tensors.append(value.detach().clone())
        return len(self._tensors) - 1

    def _largest(self, i: int) -> Fraction:
        value = self._tensors[i].detach().double().abs()
        return Fraction(float(value.max())) if value.numel() else Fraction(0)

    # -- values -------------------------------------------------------------------------------------------------------

    def _combined(self, n: fx.Node, call: Call) -> Pieces | None:
        name = name_of(call.target) or ""
        names: tuple[str, ...] = ("condition", "input", "other") if name == "where" else ("input", "other")
        if name == "where" and not call.bound("condition"):
            return None
        if name in _CASTS:
            x = self._pieces.get(_argument(n, call, "input"))
            return x if x is not None and x.is_indicator and call.out.is_floating_point() else None
        if name in ("neg", "logical_not", "invert", "bitwise_not", *_KINKS):
            names = ("input",)
        elif name not in (*_SUMS, *_PRODUCTS, *_QUOTIENTS, *_COMPARISONS, "where"):
            return None
        if any(k not in (*names, "alpha", "inplace") for k in call.slots or ()):
            return None
        parts = [self._part(n, call, k) for k in names]
        if any(p is None for p in parts):
            return None
        a, *rest = (p for p in parts if p is not None)
        if name in _COMPARISONS:
            return _compared(_COMPARISONS[name], a, rest[0])
        if name in _SUMS:
            alpha = _constant_form(call.get("alpha", 1))
            first, second = (rest[0], a) if name == "rsub" else (a, rest[0])
            return _both(_added, first, _scaled(_both(_multiplied, second, alpha), _SUMS[name]))
        if name in _PRODUCTS:
            return _both(_multiplied, a, rest[0])
        if name in _QUOTIENTS:
            divisor = _argument(n, call, "other")
            return _scaled(a, 1 / Fraction(divisor)) if _is_number(divisor) and divisor != 0 else None
        if name == "neg":
            return _scaled(a, -1)
        if name in _KINKS:
            above = _scaled(_compared(_COMPARISONS["gt"], a, _constant_form(0)), 1 - _KINKS[name])
            factor = _both(_added, above, _constant_form(_KINKS[name]))
            return _both(_multiplied, factor, a)
        if not a.is_indicator:
            return None
        negated = _both(_added, _constant_form(1), _scaled(a, -1))
        if name != "where":
            return negated if call.out.dtype == torch.bool else None
        assert negated is not None
        chosen, left = _both(_multiplied, a, rest[0]), _both(_multiplied, negated, rest[1])
        return _both(_added, chosen, left)

    def _part(self, n: fx.Node, call: Call, name: str) -> Pieces | None:
        """The forms of an argument, which is a source where no more is known; None for one that is broadcast."""
        argument, value = _argument(n, call, name), call.get(name)
        if _is_number(argument):
            return _constant_form(argument)
        if not isinstance(argument, fx.Node) or not isinstance(value, Tensor):
            return None
        if not call.bound(name):
            real = value.is_floating_point() and bool(value.isfinite().all())
            return Pieces(({None: self._coefficient(argument, value)},) * 3) if real else None
        if value.shape != call.out.shape:
            return None
        if argument in self._pieces:
            return self._pieces[argument]
        if not value.is_floating_point() or math.isinf(call.bound(name)):
            return None
        origin = call.origin(name)
        identity = (origin.identity(), value.shape) if isinstance(origin, Origin) else argument
        number = self._numbers.setdefault(identity, len(self._sources))
        self._sources += [(call.bound(name), origin)] if number == len(self._sources) else []
        return Pieces(({number: _UNIT},) * 3)

    # -- bounds -------------------------------------------------------------------------------------------------------

    def _joint(self, members: Sequence[Any]) -> float:
        """The bound of values of one switch, taken together; infinite unless each is continuous."""
        switch = members[0].switch
        assert switch is not None
        below, at, above = ([m.forms[i] for m in members] for i in range(3))
        for one, other in itertools.chain(zip(below, at), zip(above, at)):
            if not _is_multiple(_added(one, _times(other, -1)), switch):
                return math.inf
        # Where the switch is zero everywhere, for some constants, it is the middle form that counts.
        sources = sorted({s for f in (*below, *at, *above) for s in f if s is not None})
        norm = max(self._norm(rows, sources) for rows in (below, at, above))
        return mul_up(norm, joint_bound(*zip(*(self._sources[s] for s in sources)))) if sources else 0.0

    def _norm(self, rows: Sequence[Form], sources: Sequence[int]) -> float:
        """The norm of the matrix M of the coefficients of one element: at most the trace and the row sums of M^T M."""

        def entry(s: int, t: int) -> Coefficient:
            return sum((row.get(s, _ZERO) * row.get(t, _ZERO) for row in rows), _ZERO)

        trace = sum((entry(s, s) for s in sources), _ZERO).size(self._largest)
        row_sums = (sum(entry(s, t).size(self._largest) for t in sources) for s in sources)
        square = min(trace, max(row_sums, default=Fraction(0)))
        rounded = float(square)
        return root(rounded if Fraction(rounded) == square else next_up(rounded))


def _argument(n: fx.Node, call: Call, name: str) -> Any:
    """An argument as it is in the graph: a node, or a constant."""
    return value_at(call.slots[name], n.args, n.kwargs) if call.slots and name in call.slots else None


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _constant_form(x: float) -> Pieces:
    return Pieces(({None: Coefficient.number(x)} if x else {},) * 3)


def _scaled(a: Pieces | None, factor: Fraction | int) -> Pieces | None:
    return None if a is None else _both(_multiplied, a, Pieces(({None: Coefficient.number(factor)},) * 3))


def _both(function: Callable[[Form, Form], Form | None], a: Pieces | None, b: Pieces | None) -> Pieces | None:
    """A function of two values, piece by piece; None for two switches."""
    if a is None or b is None or (a.switch is not None and b.switch is not None and a.switch != b.switch):
        return None
    below, at, above = (function(f, g) for f, g in zip(a.forms, b.forms))
    if below is None or at is None or above is None or max(map(len, (below, at, above))) > _MOST_SOURCES:
        return None
    return Pieces((below, at, above), a.switch if a.switch is not None else b.switch)


def _added(a: Form, b: Form) -> Form:
    total = {s: a.get(s, _ZERO) + b.get(s, _ZERO) for s in {**a, **b}}
    return {s: c for s, c in total.items() if c}


def _times(a: Form, factor: int) -> Form:
    return {s: c * Coefficient.number(factor) for s, c in a.items()}


def _multiplied(a: Form, b: Form) -> Form | None:
    constant, form = (a, b) if set(a) <= {None} else (b, a)
    if not set(constant) <= {None}:
        return None  # a product of two activations
    factor = constant.get(None, _ZERO)
    return {s: c * factor for s, c in form.items() if c * factor}


def _compared(holds: tuple[int, int, int], a: Pieces, b: Pieces) -> Pieces | None:
    """The indicator of a comparison. Opposite switches are made one: the first of their factors is positive."""
    difference = _both(_added, a, _scaled(b, -1))
    if difference is None or difference.switch is not None or set(difference.forms[0]) <= {None}:
        return None
    switch = difference.forms[0]
    first = min(s for s in switch if s is not None)
    _, leading = min(switch[first].terms.items())
    if leading < (Fraction(0), Fraction(0)):
        switch, holds = _times(switch, -1), (holds[2], holds[1], holds[0])
    below, at, above = ({None: _UNIT} if h else {} for h in holds)
    return Pieces((below, at, above), switch)


def _is_multiple(form: Form, switch: Form) -> bool:
    """Whether a form is zero wherever the switch is: their minors are, and so the form is a multiple of it."""
    everything = list({**form, **switch})
    return not any(
        form.get(s, _ZERO) * switch.get(t, _ZERO) + -(form.get(t, _ZERO) * switch.get(s, _ZERO))
        for s, t in itertools.combinations(everything, 2)
    )
