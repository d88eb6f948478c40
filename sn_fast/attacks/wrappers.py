"""Models as PyTorch wraps them: parallel, compiled, exported, scripted. What an attack calls, and in which mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

_FLAGS = ("train", "training")


def unwrapped(model: Any) -> Any:
    """``model`` without the DistributedDataParallel around it, and without the compiler around that.

    A forward through the wrapper is a step of training to it: it sends buffers, and arms the reduction of gradients,
    which under static_graph it then takes for settled. Other wrappers stay: FullyShardedDataParallel has its parameters
    whole in its own forward alone, and the code of a compiled model is in the compiler's.
    """
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(model, nn.Module) and isinstance(getattr(model, "_orig_mod", None), nn.Module):
            if not any(isinstance(m, DistributedDataParallel) for m in model.modules()):
                return model
            model = model._orig_mod
        else:
            return model


@contextmanager
def without_reduction(model: nn.Module) -> Iterator[None]:
    """Inside, every DistributedDataParallel below ``model`` is its module alone."""
    with _shadowed(
        [(m, "forward", m.module.__call__) for m in model.modules() if isinstance(m, DistributedDataParallel)]
    ):
        yield


def is_replicated(model: Any) -> bool:
    """Whether a part of the model is copied to several devices in each forward, as DataParallel does."""
    return isinstance(model, nn.Module) and any(
        isinstance(m, DataParallel) and len(m.device_ids) > 1 for m in model.modules()
    )


# -- modes ------------------------------------------------------------------------------------------------------------


def set_mode(model: nn.Module, model_mode: str) -> None:
    """Training or evaluation; parts whose mode is part of their code must be in it."""
    training = model_mode == "train"
    for module in model.modules():
        _check_code(module, model_mode)
    fixed = [m for m in model.modules() if _is_exported(m) or _is_frozen(m)]
    if model in fixed:
        return
    try:
        with _shadowed([(m, "train", lambda mode=True: None) for m in fixed]):
            model.train(training)
    except Exception as error:
        if all(getattr(m, "training", training) == training for m in model.modules() if m not in fixed):
            return
        raise ValueError(
            f"model_mode={model_mode!r}: the model cannot be set to it ({type(error).__name__}: {error}); bring it "
            "into the mode to be attacked, and pass model_mode='keep'"
        ) from error


def flags(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Modules with their training flags, where they have one: a frozen script has none."""
    return [(m, m.training) for m in model.modules() if hasattr(m, "training")]


def _is_exported(module: nn.Module) -> bool:
    """By torch.export, which replaces the methods that set the mode by ones that raise."""
    return isinstance(module, torch.fx.GraphModule) and "train" in vars(module)


def _is_frozen(module: nn.Module) -> bool:
    """By torch.jit.freeze, in evaluation mode."""
    return isinstance(module, torch.jit.ScriptModule) and not hasattr(module, "training")


def _check_code(module: nn.Module, model_mode: str) -> None:
    if _is_exported(module):
        made, modes = "exported", {flag for m in module.modules() for flag in _flags_of_operators(m)}
        modes = modes or {False}  # decompositions remove what does nothing in evaluation
    elif _is_frozen(module):
        made, modes = "frozen", {False}
    elif isinstance(module, torch.jit.TopLevelTracedModule):
        made, modes = "traced", set(_constant_flags(module.inlined_graph))
    else:
        return
    training = model_mode == "train"
    if (not training) in modes:
        raise ValueError(
            f"model_mode={model_mode!r}: the model has a part that was {made} in "
            f"{'evaluation' if training else 'training'} mode, which is then part of its code; pass model_mode='keep' "
            "to attack it as it is, or make it anew from a model in the other mode"
        )


def _flags_of_operators(module: nn.Module) -> Iterator[bool]:
    """The training flags of the operators in an exported graph, such as dropout and batch_norm."""
    for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        for i, argument in enumerate(node.target._schema.arguments):
            if argument.name in _FLAGS:
                given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
                yield bool(given)


def _constant_flags(block: Any) -> Iterator[bool]:
    """The same of a traced graph."""
    for node in block.nodes():
        for inner in node.blocks():
            yield from _constant_flags(inner)
        if node.kind().startswith("aten::") and node.schema() != "(no schema)":
            for argument, value in zip(torch._C.parse_schema(node.schema()).arguments, node.inputs()):
                if argument.name in _FLAGS and isinstance(value.toIValue(), bool):
                    yield value.toIValue()


@contextmanager
def _shadowed(attributes: list[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Attributes of instances in place of their classes' (or their own), until the end."""
    before = [(module, name, name in vars(module), vars(module).get(name)) for module, name, _ in attributes]
    try:
        for module, name, value in attributes:
            vars(module)[name] = value
        yield
    finally:
        for module, name, had, value in before:
            if had:
                vars(module)[name] = value
            else:
                vars(module).pop(name, None)
