"""Tracing a model with torch.fx, without leaving anything behind in it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize

from ..layers.exact import is_parametrized_class, why_not_its_class
from .rules import find

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_KNOWN_BY_SHAPE = ("shape", "ndim", "dtype", "device", "is_cuda")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Leaf = Callable[[nn.Module], bool]


class Untraceable(Exception):
    """torch.fx cannot write the model as a graph, or not one that computes what the model computes."""


def _in_place(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


class _Faithful:
    """A stand-in for a tensor of which a graph shows all that is done to it.

    It takes no attributes, as a graph would not show ``x.data = y``; and ``y += x`` writes into y, where torch.fx makes
    a sum of it that other names of y do not see.
    """

    _own = ("tracer", "node", "root", "attr", "_node")

    def __getattr__(self, name: str) -> Any:
        if name in _KNOWN_BY_SHAPE and (known := self.tracer.known(self)) is not None:
            return getattr(known, name)
        return _Attribute(self, name)  # type: ignore[arg-type]

    def __len__(self) -> int:
        known = self.tracer.known(self)
        return super().__len__() if known is None else len(known)  # type: ignore[misc]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._own:
            raise TypeError(f"the attribute {name!r} of a tensor is set")
        super().__setattr__(name, value)

    __iadd__, __isub__, __imul__ = _in_place(operator.iadd), _in_place(operator.isub), _in_place(operator.imul)
    __itruediv__, __imatmul__ = _in_place(operator.itruediv), _in_place(operator.imatmul)
    __ipow__, __ifloordiv__, __imod__ = map(_in_place, (operator.ipow, operator.ifloordiv, operator.imod))


class _Proxy(_Faithful, fx.Proxy):
    """The stand-in for a value."""


class _Attribute(_Faithful, fx.proxy.Attribute):
    """The stand-in for an attribute of one."""


class Tracer(fx.Tracer):
    """Calls of modules that have a rule, and of other layers of PyTorch, become nodes; the rest is traced through.

    Args:
        leaf: whether calls of a module become nodes.
    """

    def __init__(self, leaf: Leaf) -> None:
        super().__init__(param_shapes_constant=True)
        self._leaf = leaf

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def known(self, proxy: fx.Proxy) -> Tensor | None:
        """A tensor of the shape and dtype of a value, if they are known."""
        return None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self._leaf(m)


class ShapedTracer(Tracer):
    """One that knows the shape of each value: every call is run on tensors without elements.

    Args:
        leaf: as in ``Tracer``. args: the arguments of the call that is traced.
    """

    def __init__(self, leaf: Leaf, args: tuple[Any, ...]) -> None:
        super().__init__(leaf)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._values: dict[fx.Node, Any] = {}
        self._given = iter(args)
        self._running = False

    def known(self, proxy: fx.Proxy) -> Tensor | None:
        value = self._values.get(proxy.node)
        return value if isinstance(value, Tensor) else None

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        proxy = super().create_proxy(kind, *args, **kwargs)
        try:
            value = self._run(proxy.node)
        except Exception:  # it needs elements, or a value that is not known
            return proxy
        if kind in ("call_function", "call_method") and isinstance(value, (int, torch.Size)):
            proxy.node.graph.erase_node(proxy.node)
            return value
        self._values[proxy.node] = value
        return proxy

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _run(self, n: fx.Node) -> Any:
        if n.op == "placeholder":
            return fx.node.map_aggregate(next(self._given), self._without_elements)
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._values.__getitem__)
        self._running = True
        try:
            if n.op == "get_attr":
                return self._without_elements(operator.attrgetter(str(n.target))(self.root))
            with self._mode:
                if n.op == "call_module":
                    return self.root.get_submodule(str(n.target)).forward(*args, **kwargs)
                if n.op == "call_method":
                    return getattr(args[0], str(n.target))(*args[1:], **kwargs)
                return n.target(*args, **kwargs)  # type: ignore[operator]
        finally:
            self._running = False

    def _without_elements(self, value: Any) -> Any:
        return self._mode.from_tensor(value, static_shapes=True) if isinstance(value, Tensor) else value


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of this module is one node of the graph: not where other code replaces that of its class."""
    if isinstance(module, parametrize.ParametrizationList) or find(module) is not None:
        return True
    own = next(c for c in type(module).__mro__ if not is_parametrized_class(c))
    of_torch = own.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, _CONTAINERS)
    ours = own.__module__.startswith("torch.ao.") or why_not_its_class(module, hooks=False, statistics=False) is None
    return of_torch and ours


def trace(model: nn.Module, args: tuple[Any, ...], leaf: Leaf = is_leaf) -> tuple[nn.Module, fx.Graph]:
    """A module that holds the model as ``model``, and its graph when called with so many positional arguments.

    The call of the model is traced, not its forward: with its hooks, and with the forward that the instance has.
    Where its code asks for the shapes of values, the graph is that for the shapes of these arguments.

    Raises:
        Untraceable: with the reason.
    """
    names = ", ".join(f"x{i}" for i in range(len(args)))
    # torch.fx reads the arguments off the code of a function.
    forward = eval(f"lambda self, {names}: self.model({names})")
    holder = type("Holder", (nn.Module,), {"forward": forward})()
    holder.model = model
    errors: list[Exception] = []
    for tracer in (Tracer(leaf), ShapedTracer(leaf, args)):
        with attributes_restored(model):
            try:
                return holder, tracer.trace(holder)
            except Exception as error:  # tracing runs the model's own code on stand-ins: anything can be raised
                errors.append(error)
    raise Untraceable(_first_line(errors[0])) from errors[0]


def own_name(path: str) -> str:
    """The path below the model of what is in the holder."""
    return path.removeprefix("model").removeprefix(".")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper, unless that has hooks."""
    while not (model._forward_hooks or model._forward_pre_hooks):
        if type(model) in (nn.DataParallel, nn.parallel.DistributedDataParallel) and "forward" not in vars(model):
            inner = model.module
        elif type(model).__name__ == "OptimizedModule" and type(model).__module__.startswith("torch._dynamo"):
            inner = model._orig_mod
        else:
            break
        assert isinstance(inner, nn.Module)
        model = inner
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, no autocast; every training flag and the state of the random generators come back."""
    training = {m: m.training for m in model.modules()}
    kinds = {p.device.type for p in model.parameters()} | {"cpu"}
    gpus = [p.device for p in model.parameters() if p.device.type == "cuda"]
    with torch.random.fork_rng(devices=sorted({d.index for d in gpus})), torch.inference_mode(False), torch.no_grad():
        try:
            model.eval()
            with _no_autocast(kinds), attributes_restored(model):
                yield
        finally:
            for m, flag in training.items():
                m.training = flag


@contextmanager
def _no_autocast(kinds: set[str]) -> Iterator[None]:
    if not kinds:
        yield
        return
    first, *rest = sorted(kinds)
    with torch.autocast(first, enabled=False), _no_autocast(set(rest)):
        yield


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """What the model's code stores in attributes and buffers meanwhile is taken away again."""
    before = [(m, dict(vars(m)), {k: dict(vars(m)[k]) for k in _REGISTRIES}) for m in model.modules()]
    values = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    try:
        yield
    finally:
        for m, attributes, registries in before:
            vars(m).clear()
            vars(m).update(attributes)
            for name, entries in registries.items():
                vars(m)[name].clear()
                vars(m)[name].update(entries)
        for buffer, value in values:
            if not torch.equal(buffer, value):
                buffer.data.copy_(value)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
