"""A certified bound of a whole network's Lipschitz constant: the bound of every node, from the input on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from ..layers.exact import why_not_its_class
from ..layers.observe import check_is_no_shape
from ..layers.weighted import is_dtensor
from . import (  # noqa: F401 - they register rules
    activations,
    contractions,
    layout,
    products,
    reductions,
    refusals,
    response_norm,
    sums,
    windows,
)
from .graph import Untraceable, evaluating, is_leaf, own_name, trace, unwrapped
from .hooks import observed_call, silent
from .origins import joint_bound
from .pieces import PiecewiseLinear
from .report import LayerBound, LipschitzReport
from .rules import Call, Outcome, apply_rule, find, kind_of, leaves, no_bound, outcome_of
from .tracking import Tracking, copied, tensors, writes_in_place
from .verify import refuted, same_values

_INTEGERS_JUMP = "integers computed from the input jump: no finite bound"
_HOOKED = "a forward hook may change its input or output: no rule"
_UNANNOUNCED = "it writes into an argument: no rule"
_BROKEN = "its graph refers to values that it does not have"
_STATE = "the model writes what depends on its input into its own tensors"
_ALIASED = "written in place through a view: no rule"


def lipschitz_bound(
    model: nn.Module, example_input: Tensor | tuple[Any, ...], *, fold_batchnorm: bool = True
) -> LipschitzReport:
    """A number that |f(x) - f(y)|_2 / |x - y|_2 never exceeds, for a model f in eval mode, and each layer's share.

    The model is written as a graph by torch.fx. Each node carries a bound of the map from the network's input to it:
    layers multiply it by their constant, sums add, concatenations take the root of the squares.
    The constants are certified: computed in float64 and rounded up. They are those of the exact function; the rounding
    of the network's own arithmetic, and of casts between floating-point dtypes, is not in them.
    A call has a finite constant only if a rule covers it with all its arguments. A layer whose forward, class or
    methods were replaced is bounded by the code that it runs. A choice by comparisons with the input has a finite one
    where it is seen to be continuous: between two forms that are linear in it, and agree where the comparison changes.
    ``detach`` and ``data`` cut gradients, not slopes: they
    count as the identity. At the end the graph is run beside the model at two more inputs; a slope above the bound, or
    another result, makes it infinite.

    Args:
        model: is run a few times in eval mode, without gradients; training flags, buffers and attributes stay as they
            are. Forward hooks that only look on see two of these calls; where one may change what a layer computes,
            there is no bound.
        example_input: a tensor, or a tuple of arguments; batch size 1 is enough. Convolutions and pooling are bounded
            for its spatial size. With several tensors the bound is with respect to all of them together,
            |(x1, x2)|_2, also those of integers (masks, indices), for which there is no finite one.
        fold_batchnorm: bound a convolution or linear layer and the batch normalisation that alone follows it as one
            linear map, whose norm is at most the product of the two.

    Returns:
        The report. The bound is per sample if the model treats the samples of a batch independently. It is infinite
        where a layer has no finite bound, or none that is of use; the report says which and why.

    Raises:
        TypeError: ``model`` is not a module, or ``example_input`` neither tensor nor tuple.
        ValueError: a weight has NaN or infinite elements, is on the meta device, or has no shape yet.
    Warns:
        UserWarning: torch.fx cannot trace the model: the report has the layers one by one, and no bound.

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    check_is_no_shape(example_input)
    if not isinstance(example_input, (Tensor, tuple)):
        raise TypeError(f"example_input is a {type(example_input).__name__}; give a tensor, or a tuple of arguments")
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    if not any(isinstance(a, Tensor) for a in leaves(args)):
        raise TypeError("example_input is a tuple without a tensor; give the model's arguments")
    model = unwrapped(model)
    check_tensors(model, args)
    with evaluating(model):
        try:
            propagation = _Propagation(model, args, fold_batchnorm)
            output = propagation.run(*copied(args))
            bound, reason = propagation.output_bound, propagation.output_reason
            if math.isfinite(bound):
                if not same_values(output, expected := model(*copied(args))):
                    raise Untraceable("the traced graph computes something else than the model")
                with silent(propagation.onlookers):
                    reason = refuted(bound, propagation.plain(), model, args, expected)
                bound = math.inf if reason else bound
        except Untraceable as error:
            reason = f"the model could not be traced by torch.fx ({error})"
            warnings.warn(f"lipschitz_bound: {reason}; the report has layers only, and no bound", stacklevel=2)
            return LipschitzReport(math.inf, tuple(_layers_alone(model, copied(args))), reason)
    return LipschitzReport(bound, tuple(propagation.rows.values()), reason)


class _Propagation(fx.Interpreter):
    """Runs the graph, and beside each value computes the bound of the map from the input to it."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], fold: bool) -> None:
        holder, graph = trace(model, args)
        super().__init__(holder, graph=graph)
        self.extra_traceback = False
        self.fold = fold
        self.onlookers: list[nn.Module] = []  # layers whose hooks do not change what they compute
        self.tracking = Tracking(model)
        self.pieces = PiecewiseLinear()
        self.bounds = self.tracking.bounds
        self.rows: dict[fx.Node, LayerBound] = {}
        self.output_bound = 0.0
        self.output_reason = ""
        self.cache: dict[Any, Any] = {}
        self.waiting: dict[fx.Node, Call] = {}  # a normalisation, and the layer before it that it is folded into

    def plain(self) -> fx.Interpreter:
        """The graph on its own."""
        interpreter = fx.Interpreter(self.module, graph=self.graph)
        interpreter.extra_traceback = False
        return interpreter

    def run_node(self, n: fx.Node) -> Any:
        try:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
        except RuntimeError as error:  # a stand-in was copied, with the graph that it is in
            raise Untraceable(_BROKEN) from error
        self.hooked = False  # whether hooks may change what this node computes
        versions = [(t, t._version) for t in tensors((args, kwargs))]
        # A rule needs the arguments as they were.
        before = copied((args, kwargs)) if writes_in_place(n, self._module(n)) else (args, kwargs)
        try:
            value = super().run_node(n)
        except Exception as error:  # the model itself fails on this input, or only its trace: the fallback finds out
            raise Untraceable(f"its graph fails at {own_name(n.name)}: {type(error).__name__}") from error
        if n.op == "placeholder":
            self.bounds[n] = 1.0 if list(tensors(value)) else 0.0
        elif n.op == "get_attr":
            self.tracking.is_state(value)
            self.bounds[n] = 0.0
        elif n.op == "output":
            self._finish(n)
        else:
            written = [t for t, version in versions if t._version != version]
            unannounced = bool(written) and before[0] is args and not self.hooked
            if written:
                self.pieces.forget()
            self.bounds[n] = self._bound_of(n, before[0], before[1], value, bool(written), unannounced)
            if not (written or self.bounds[n]):
                self.pieces.constant(n, value, args, kwargs)
            for other in self.tracking.spread(n, value, written, self.env):
                self.rows[other] = LayerBound(function_name(other), "view", None, math.inf, "none", _ALIASED)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if why_not_its_class(module, statistics=False) is None or not find(module):
            return module(*args, **kwargs)
        out, self.hooked = observed_call(module, args, kwargs)
        self.onlookers.append(module)
        return out

    def _module(self, n: fx.Node) -> nn.Module | None:
        return self.fetch_attr(str(n.target)) if n.op == "call_module" else None

    def _bound_of(
        self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any, written: bool, unannounced: bool
    ) -> float:
        if not any(self.bounds[i] for i in n.all_input_nodes):
            return 0.0
        call = self._call(n, args, kwargs, value)
        if self.fold and not self.hooked and (norm := self._normalisation_after(n)) is not None:
            self.waiting[norm] = call
            return max(call.all_bounds())  # not zero: the normalisation must be reached
        layer = self.waiting.pop(n, None)
        if layer is not None:
            return self._fold(n, layer, call)
        outcome = outcome_of(call, no_bound(_UNANNOUNCED), 1.0) if unannounced else self._outcome(call)
        outcome = replace(outcome, bound=self.tracking.follow(n, call, outcome))
        if not (self.hooked or written) and (piece := self.pieces.follow(n, call)) is not None:
            self.tracking.comes_from(n, piece)
            if piece.bound < outcome.bound:
                outcome = Outcome(None, piece.bound, "piecewise linear")
        self._add_row(n, call, outcome)
        return outcome.bound

    def _call(self, n: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Call:
        module = self._module(n)
        name = (own_name(str(n.target)) or kind_of(module)) if module is not None else function_name(n)

        def origin(argument: Any) -> Any:
            return self.tracking.origin(argument, self.env.get(argument)) if isinstance(argument, fx.Node) else None

        def bound(argument: Any) -> Any:
            return self.bounds[argument] if isinstance(argument, fx.Node) else 0.0

        trees: list[Any] = [fx.node.map_aggregate(a, f) for f in (bound, origin) for a in (n.args, n.kwargs)]
        bounds, keyword_bounds, origins, keyword_origins = trees
        return Call(
            name,
            module if module is not None else n.target,
            args,
            kwargs,
            bounds,
            keyword_bounds,
            value,
            self.cache,
            origins,
            keyword_origins,
        )

    def _normalisation_after(self, n: fx.Node) -> fx.Node | None:
        """The batch normalisation that alone uses the result of this linear layer."""
        entry = self._entry(n)
        if entry is None or entry.function is not products.linear_layer or len(n.users) != 1:
            return None
        (after,) = n.users
        entry = self._entry(after)
        is_norm = entry is not None and entry.function is products.batch_norm
        return after if is_norm and after.all_input_nodes[0] is n and _used_once(n, after) else None

    def _entry(self, n: fx.Node) -> Any:
        if n.op not in ("call_module", "call_function", "call_method"):
            return None
        return find(self._module(n) if n.op == "call_module" else n.target)

    def _outcome(self, call: Call) -> Outcome:
        return outcome_of(call, no_bound(_HOOKED), 1.0) if self.hooked else apply_rule(call)

    def _fold(self, n: fx.Node, layer: Call, norm: Call) -> float:
        linear = not (self.hooked or any(layer.other_bounds() + norm.other_bounds()))
        linear = linear and layer.slots is not None and norm.slots is not None
        constant = products.folded(layer, norm) if linear else None
        before = layer.bound("input"), norm.bound("input")
        if constant is None or not all(before) or layer.left_over() or norm.left_over():
            alone = apply_rule(layer)
            self._add_row(n.all_input_nodes[0], layer, alone)
            norm.put_bound("input", alone.bound)
            outcome = self._outcome(norm)
            self._add_row(n, norm, outcome)
            return outcome.bound
        outcome = outcome_of(norm, constant, layer.x_bound)
        row = LayerBound(
            f"{layer.name} + {norm.name}",
            f"{layer.kind} + {norm.kind}",
            outcome.constant,
            outcome.bound,
            outcome.how,
            outcome.reason,
        )
        self.rows[n] = row
        return outcome.bound

    def _add_row(self, n: fx.Node, call: Call, outcome: Outcome) -> None:
        entry = find(call.target)
        moves_only = entry is not None and entry.function.__module__ == layout.__name__
        if call.module is None and moves_only and outcome.constant in (0.0, 1.0):
            return
        row = LayerBound(call.name, call.kind, outcome.constant, outcome.bound, outcome.how, outcome.reason)
        self.rows[n] = row

    def _finish(self, output: fx.Node) -> None:
        for n in self.pieces.inner(self.graph):
            self.rows.pop(n, None)
        parts: list[fx.Node] = []  # each as often as it is returned
        fx.node.map_arg(output.args, lambda n: parts.append(n) if self.bounds[n] else None)
        origins = [self.tracking.origin(n, self.env[n]) for n in parts]
        self.output_bound = joint_bound([self.bounds[n] for n in parts], origins)
        if self.tracking.changed_state:
            self.output_bound, self.output_reason = math.inf, _STATE
        elif any(not (t.is_floating_point() or t.is_complex()) for n in parts for t in tensors(self.env[n])):
            self.output_bound, self.output_reason = math.inf, _INTEGERS_JUMP
        elif math.isinf(self.output_bound):
            self.output_reason = next((f"{r.name}: {r.reason}" for r in self.rows.values() if r.reason), "overflow")


def _layers_alone(model: nn.Module, args: tuple[Any, ...]) -> Iterator[LayerBound]:
    """The layers of a model whose graph is not known, in the order of their calls."""
    calls: list[Call] = []
    cache: dict[Any, Any] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            bounds = tuple(float(isinstance(a, Tensor)) for a in args)
            keyword_bounds = {k: float(isinstance(a, Tensor)) for k, a in kwargs.items()}
            calls.append(Call(name, module, args, kwargs, bounds, keyword_bounds, out, cache))

        return hook

    handles = [
        m.register_forward_hook(watch(name or kind_of(m)), with_kwargs=True)
        for name, m in model.named_modules()
        if is_leaf(m) and not isinstance(m, nn.utils.parametrize.ParametrizationList)
    ]
    try:
        model(*args)
    finally:
        for handle in handles:
            handle.remove()
    for call in calls:
        if any(call.all_bounds()):
            outcome = apply_rule(call)
            yield LayerBound(call.name, call.kind, outcome.constant, math.inf, outcome.how, outcome.reason)


def check_tensors(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Raise where a weight, a buffer or an input has no values, or a weight has NaN or infinite elements."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    for name, t in named:
        if is_lazy(t):
            raise ValueError(f"{name!r} has no shape yet: run the model once before")
        if t.is_meta:
            raise ValueError(f"{name!r} is on the meta device and has no values; move the model to a real device")
        if is_dtensor(t):
            raise ValueError(f"{name!r} is a DTensor, which processes share; give the model with whole weights")
        # Infinity may be meant in a buffer, such as an attention mask.
        bad = t.isnan() if not isinstance(t, nn.Parameter) else ~t.isfinite()
        if t.is_floating_point() and bool(bad.any()):
            layer, _, own = name.rpartition(".")
            raise ValueError(f"layer {layer or type(model).__name__!r}: {own} has NaN or infinite elements")
    if any(t.is_meta for t in tensors(args)):
        raise ValueError("example_input is on the meta device; give a real tensor")


def _used_once(n: fx.Node, user: fx.Node) -> bool:
    count = 0

    def look(argument: fx.Node) -> fx.Node:
        nonlocal count
        count += argument is n
        return argument

    fx.node.map_arg((user.args, user.kwargs), look)
    return count == 1


def function_name(n: fx.Node) -> str:
    """The node's name, below the module whose forward has the call."""
    stack = n.meta.get("nn_module_stack") or {}
    path = own_name(next(reversed(stack.values()))[0]) if stack else ""
    return f"{path}.{n.name}".lstrip(".")
