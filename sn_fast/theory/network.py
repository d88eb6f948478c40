"""A network as the theorems have it: linear layers one after another, with activations between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..layers.kinds import kind_of, spatial_axes
from ..layers.linear import operator_of
from ..layers.operators import LinearOperator
from ..layers.weighted import LayerOperator, layer_operator
from ..lipschitz import activations as activation_rules
from ..lipschitz import layout, products, propagate, reductions, windows
from ..lipschitz.graph import Untraceable, evaluating, is_leaf, own_name, trace, unwrapped
from ..lipschitz.hooks import observed_call
from ..lipschitz.rules import Call, Entry, apply_rule, find
from ..lipschitz.rules import kind_of as kind_name
from ..lipschitz.verify import same_values
from .activations import curvature, is_elementwise, is_identity

_SETTING = "the theorems are for linear layers in a row with activations between them"
_LINEAR_REDUCTIONS = ("mean", "sum")
_SUMS = ("add", "iadd", "sub", "isub", "rsub", "subtract")
_PRODUCTS = ("mul", "imul", "multiply", "div", "truediv", "itruediv", "divide", "true_divide")


class OutsideSetting(ValueError):
    """The theorems do not cover this network; the message names the layer and the reason."""


@dataclass(frozen=True)
class Layer:
    """One linear layer in use.

    Attributes:
        name: path of the module, or of the function's call. A layer's second use in a forward is "name (2)".
        kind: class or function.
        operator: its linear map at its input size, with the weight in use.
        copies: how often it acts on one sample, side by side: a Linear layer acts on each row of a sequence.
        key: equal for uses of the same map.
    """

    name: str
    kind: str
    operator: LinearOperator
    copies: int = 1
    key: Any = None


@dataclass(frozen=True)
class Between:
    """What is between two layers: an activation, or a map such as pooling.

    Attributes:
        name, kind: as of a layer.
        slope: its l2 Lipschitz constant, from above.
        curvature: Lipschitz constant of its Jacobian; infinite where the slope jumps.
        activation: whether it acts on each element alone.
    """

    name: str
    kind: str
    slope: float
    curvature: float
    activation: bool


@dataclass
class Network:
    """Layers in their order, and what is before, between and after them.

    Attributes:
        between: one list more than there are layers; ``between[i]`` comes before layer i.
        notes: what the theorems do not have, but leave room for.
    """

    layers: list[Layer] = field(default_factory=list)
    between: list[list[Between]] = field(default_factory=lambda: [[]])
    notes: list[str] = field(default_factory=list)


def follow(model: nn.Module, example_input: Tensor) -> Network:
    """The layers of a model in the order of use, found by following its forward once, in eval mode.

    Raises:
        OutsideSetting: the network is no chain of linear layers and activations, or cannot be followed.
        TypeError, ValueError: the arguments are no module and floating-point tensor, or hold no finite values.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    if not isinstance(example_input, Tensor) or not example_input.is_floating_point():
        found = getattr(example_input, "dtype", type(example_input).__name__)
        raise TypeError(f"example_input is {found}; give a floating-point tensor with a batch dimension")
    model = unwrapped(model)
    propagate.check_tensors(model, (example_input,))
    with evaluating(model):
        x = example_input.detach()
        try:
            holder, graph = trace(model, (x,), _is_step)
        except Untraceable as error:
            raise OutsideSetting(f"the model cannot be followed ({error}): {_SETTING}") from error
        chain = _Chain(holder, graph)
        output = chain.run(x.clone())
        if not same_values(output, model(x.clone())):
            raise OutsideSetting("the model computes something else when it is called a second time")
    return chain.network


def _is_step(module: nn.Module) -> bool:
    """Whether a call of this module is one step: layers of a known kind are, whatever their forward does."""
    return kind_of(module) is not None or is_leaf(module)


class _Chain(fx.Interpreter):
    """Runs the graph, and sees to it that each step takes the result of the one before, and of no other."""

    def __init__(self, holder: nn.Module, graph: fx.Graph) -> None:
        super().__init__(holder, graph=graph)
        self.extra_traceback = False
        self.network = Network()
        self._head: Tensor | None = None
        self._dependent: dict[int, Tensor] = {}  # by id, every value that depends on the input; kept, so ids are theirs
        self._uses: dict[str, int] = {}
        self._biases: list[str] = []

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(str(target))
        if kind_of(module) is not None or not find(module):
            return module(*args, **kwargs)
        out, hooked = observed_call(module, args, kwargs)
        if hooked:
            name = own_name(str(target))
            raise OutsideSetting(f"layer {name!r}: a forward hook may change its input or output: {_SETTING}")
        return out

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        inputs = [v for v in (self.env[i] for i in n.all_input_nodes) if id(v) in self._dependent]
        was_head = [v is self._head for v in inputs]
        before = [v.clone() for v in inputs] if inputs and n.op != "output" else []
        try:
            value = super().run_node(n)
        except OutsideSetting:
            raise
        except Exception as error:  # the model itself fails on this input
            raise ValueError(f"the model fails on example_input at {self._name(n)}: {error}") from error
        if n.op == "placeholder":
            self._advance(value)
        elif n.op == "output":
            if not isinstance(value, Tensor) or value is not self._head:
                raise OutsideSetting(f"the model does not return the result of its last layer alone: {_SETTING}")
            self._finish()
        elif inputs and not _is_of_shape(value):
            name, kind = self._name(n), kind_name(self._target(n))
            if len(inputs) > 1 or not all(was_head):
                raise OutsideSetting(f"{name} ({kind}) takes more than the result of the step before it: {_SETTING}")
            # The arguments as they were: a step may write into its input.
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: before[0] if a is inputs[0] else a)
            if not isinstance(value, Tensor):
                raise OutsideSetting(f"{name} ({kind}) returns several values: {_SETTING}")
            self._step(n, name, args, kwargs, value)
            self._advance(value)
        return value

    def _advance(self, value: Tensor) -> None:
        self._head = value
        self._dependent[id(value)] = value

    def _target(self, n: fx.Node) -> Any:
        return self.fetch_attr(str(n.target)) if n.op == "call_module" else n.target

    def _name(self, n: fx.Node) -> str:
        name = own_name(str(n.target)) if n.op == "call_module" else propagate.function_name(n)
        return name or kind_name(self._target(n))

    # -- steps --------------------------------------------------------------------------------------------------------

    def _step(self, n: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> None:
        target = self._target(n)
        if isinstance(target, nn.Module) and kind_of(target) is not None:
            self._add_layer(name, target, args, kwargs, value)
            return

        def dependent(argument: Any) -> float:
            return float(id(self.env.get(argument)) in self._dependent) if isinstance(argument, fx.Node) else 0.0

        bounds, keyword_bounds = (fx.node.map_aggregate(a, dependent) for a in (n.args, n.kwargs))
        call = Call(name, target, args, kwargs, bounds, keyword_bounds, value)  # type: ignore[arg-type]
        entry = find(target)
        if entry is None:
            raise OutsideSetting(f"{name} ({call.kind}) is neither a linear layer nor an activation: {_SETTING}")
        if entry.function is products.linear_layer:
            with _named(name, call.kind):
                operator = products.linear_map(call)
            self._append(name, call.kind, operator, value, _size(call.get("bias", None)))
            return
        outcome = apply_rule(call)
        if not math.isfinite(outcome.bound):
            raise OutsideSetting(f"{name} ({call.kind}): {outcome.reason}")
        if entry.function is products.batch_norm:
            self._add_normalisation(name, call, outcome.bound)
        else:
            self._add_between(name, call, entry, outcome.bound)

    def _add_layer(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor
    ) -> None:
        x = next(iter((*args, *kwargs.values())))
        axes = spatial_axes(module)
        with _named(name, kind_name(module)):
            operator = operator_of(module, tuple(x.shape[x.ndim - axes :]) if axes else None)
            layer = layer_operator(operator)
            operator = operator if layer is None else LayerOperator(layer.weight.detach(), layer.geometry)
            offset = _offset(module, operator, x, value)
        key = None if layer is None else (id(module), layer.geometry)
        self._append(name, kind_name(module), operator, value, offset, key)

    def _append(
        self, name: str, kind: str, operator: LinearOperator, value: Tensor, offset: float, key: Any = None
    ) -> None:
        self._uses[name] = self._uses.get(name, 0) + 1
        if self._uses[name] == 2:
            self.network.notes.append(f"{name} is used more than once; the theorems have a weight of its own per layer")
        if self._uses[name] > 1:
            name = f"{name} ({self._uses[name]})"
        copies = value[0].numel() // math.prod(operator.out_shape)
        self.network.layers.append(Layer(name, kind, operator, copies, key))
        self.network.between.append([])
        if offset:
            self._biases.append(name)

    def _add_normalisation(self, name: str, call: Call, constant: float) -> None:
        scale = products.normalisation_scale(call)
        last = self.network.layers[-1] if self.network.layers else None
        layer = None if last is None or self.network.between[-1] else layer_operator(last.operator)
        fits = layer is not None and call.x.ndim == len(layer.out_shape) + 1
        if last is None or layer is None or scale is None or not fits or scale.numel() != layer.out_shape[0]:
            self._between(name, call, constant, 0.0, activation=False)
        else:
            joined = products.scaled_outputs(layer, scale)
            self.network.layers[-1] = Layer(f"{last.name} + {name}", f"{last.kind} + {call.kind}", joined)
        self.network.notes.append(f"{name} normalises with running statistics, and counts as a part of a linear map")

    def _add_between(self, name: str, call: Call, entry: Entry, constant: float) -> None:
        room, kind = entry.function.__module__, call.kind.rstrip("_")
        if room == activation_rules.__name__ and is_elementwise(call):
            if is_identity(call):
                return
            if constant > 1:
                raise OutsideSetting(f"{name} ({call.kind}) has slopes up to {constant:.4g}; the theorems allow 1")
            self._between(name, call, constant, curvature(call), activation=True)
            at_zero = float(call.again(torch.zeros_like(call.x)).abs().max())
            if at_zero:
                self.network.notes.append(f"{name} ({call.kind}) is {at_zero:.4g} at zero; the theorems have s(0) = 0")
        elif room == windows.__name__:
            self._between(name, call, constant, math.inf if "max" in call.kind.lower() else 0.0, activation=False)
        elif room == layout.__name__:
            if constant != 1:
                self._between(name, call, constant, 0.0, activation=False)
        elif room == reductions.__name__ and kind in _LINEAR_REDUCTIONS:
            self._between(name, call, constant, 0.0, activation=False)
        elif kind in (*_SUMS, *_PRODUCTS):
            if constant != 1:
                self._between(name, call, constant, 0.0, activation=False)
            if kind in _SUMS:
                self.network.notes.append(f"{name} ({call.kind}) shifts its input, which the theorems do not have")
        else:
            raise OutsideSetting(f"{name} ({call.kind}) is neither a linear layer nor an activation: {_SETTING}")

    def _between(self, name: str, call: Call, slope: float, curved: float, *, activation: bool) -> None:
        self.network.between[-1].append(Between(name, call.kind, slope, curved, activation))

    def _finish(self) -> None:
        network = self.network
        if not network.layers:
            raise OutsideSetting(f"the model has no linear layer: {_SETTING}")
        if self._biases:
            network.notes.insert(0, f"the theorems have no biases; {', '.join(dict.fromkeys(self._biases))} have one")
        for where, steps in (("before the first", network.between[0]), ("after the last", network.between[-1])):
            for step in steps:
                if step.curvature:
                    raise OutsideSetting(
                        f"{step.name} ({step.kind}) comes {where} linear layer: the theorems have linear layers at "
                        "both ends; give the model without it"
                    )


class _named:
    """Errors of a layer, with its name."""

    def __init__(self, name: str, kind: str) -> None:
        self._prefix = f"layer {name!r} ({kind})"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, (ValueError, TypeError)) and not isinstance(error, OutsideSetting):
            raise OutsideSetting(f"{self._prefix}: {error}") from error


def _is_of_shape(value: Any) -> bool:
    """Whether a value that was read off a tensor is its shape, dtype or device."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(_is_of_shape(v) for v in value)
    return isinstance(value, (bool, int, str, torch.dtype, torch.device))


def _offset(module: nn.Module, operator: LinearOperator, x: Tensor, value: Tensor) -> float:
    """The largest element of what a layer adds to its linear map; where it is no such map, an error."""
    bias = getattr(module, "bias", None)
    if kind_of(module).why_not_exact(module) is None and not kind_of(module).of_user:  # type: ignore[union-attr]
        return _size(bias)
    zero = module(torch.zeros_like(x))
    image = operator.matvec(x.reshape(-1, *operator.in_shape)).reshape(value.shape)
    size = float(value.abs().max()) + float(zero.abs().max())
    if float((value - zero - image).abs().max()) > 1e-3 * size:
        raise ValueError("its forward is more than its linear map and a bias")
    return float(zero.abs().max())


def _size(bias: Tensor | None) -> float:
    return 0.0 if bias is None else float(bias.detach().abs().max())
