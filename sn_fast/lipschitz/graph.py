"""Tracing a model with torch.fx, without leaving anything behind in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from .rules import find, is_parametrized_class, kind_of

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Untraceable(Exception):
    """torch.fx cannot write the model as a graph, or not one that computes what the model computes."""


class Tracer(fx.Tracer):
    """Calls of modules that have a rule, and of other layers of PyTorch, become nodes; the rest is traced through."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of this module is one node of the graph."""
    if isinstance(module, parametrize.ParametrizationList) or find(module) is not None:
        return True
    own = next(c for c in type(module).__mro__ if not is_parametrized_class(c))
    return own.__module__.startswith(("torch.nn.", "torch.ao.nn.")) and not isinstance(module, _CONTAINERS)


def graph_of_layer(layer: nn.Module, n_arguments: int) -> tuple[nn.Module, fx.Graph]:
    """A model that is itself one layer, as a module that holds it, and its graph."""
    graph = fx.Graph()
    arguments = tuple(graph.placeholder(f"x{i}") for i in range(n_arguments))
    name = kind_of(layer)
    graph.output(graph.call_module(name, arguments))
    return nn.ModuleDict({name: layer}), graph


def trace(model: nn.Module, n_arguments: int) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of a model called with so many positional arguments, and the constants that the graph refers to.

    Raises:
        Untraceable: with the reason.
    """
    tracer = Tracer()
    with _attributes_restored(model):
        try:
            graph = tracer.trace(model, concrete_args=_defaults(model, n_arguments))
        except Exception as error:  # tracing runs the model's own code on stand-ins: anything can be raised
            raise Untraceable(_first_line(error)) from error
        constants = {
            str(node.target): getattr(model, str(node.target))
            for node in graph.nodes
            if node.op == "get_attr" and str(node.target).startswith(("_tensor_constant", "_torchbind_obj"))
        }
    return graph, constants


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's, DataParallel's or DistributedDataParallel's wrapper."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
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
            with _no_autocast(kinds):
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
def _attributes_restored(model: nn.Module) -> Iterator[None]:
    """Tracing runs the model's code on stand-ins; what it stored in attributes meanwhile is taken away again."""
    before = {m: dict(vars(m)) for m in model.modules()}
    try:
        yield
    finally:
        for m, attributes in before.items():
            vars(m).clear()
            vars(m).update(attributes)


def _defaults(model: nn.Module, n_arguments: int) -> dict[str, Any]:
    """Arguments that are not given, at their defaults, so that ``if mask is None`` can be traced."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters: Sequence[inspect.Parameter] = list(inspect.signature(model.forward).parameters.values())
    given = [p.name for p in parameters if p.kind in positional][:n_arguments]
    # torch.fx would take containers apart.
    plain = (type(None), bool, int, float, str)
    return {p.name: p.default for p in parameters if p.name not in given and isinstance(p.default, plain)}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
