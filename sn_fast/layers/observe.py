"""The input sizes at which a model uses its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from .kinds import spatial_axes


def observed_input_sizes(
    model: nn.Module, layers: Mapping[str, nn.Module], example_input: Tensor | tuple[Any, ...] | Mapping[str, Any]
) -> dict[str, list[tuple[int, ...]]]:
    """Run ``model`` once, in eval mode and without gradients, and watch what ``layers`` are given.

    ``example_input`` is a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        {name: spatial size of the input, call by call}: ``()`` for layers other than convolutions. Layers that are not
        called are left out.
    """
    sizes: dict[str, list[tuple[int, ...]]] = {}

    def watch(name: str, n: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            sizes.setdefault(name, []).append(tuple(x.shape[-n:]) if n and x is not None else ())

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name, spatial_axes(module)), with_kwargs=True)
        for name, module in layers.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            _run(model, example_input)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input among the arguments of a layer's forward, which may give it another name than ``input``."""
    found = args[0] if args else kwargs.get("input")
    if found is None and not args:
        found = next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    return found if isinstance(found, Tensor) else None


def check_is_no_shape(example_input: object) -> None:
    """Raise TypeError where a shape was given in place of a tensor of that shape."""
    if isinstance(example_input, (tuple, list)) and example_input and all(type(n) is int for n in example_input):
        sizes = ", ".join(map(str, example_input))
        raise TypeError(f"example_input=({sizes}) is a shape; give a tensor, e.g. torch.zeros({sizes})")


def _run(model: nn.Module, example_input: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> None:
    args = example_input if isinstance(example_input, tuple) else ()
    kwargs = dict(example_input) if isinstance(example_input, Mapping) else {}
    if isinstance(example_input, Tensor):
        args = (example_input,)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if not any(t.is_meta for t in state.values()):
        model(*args, **kwargs)
        return
    # Without memory: shapes alone are computed, and all tensors have to be on meta for that.
    state, args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (state, args, kwargs))
    try:
        functional_call(model, state, args, kwargs)
    except Exception as error:  # a forward that is not ours can fail in any way
        raise ValueError(
            f"the model's forward fails on the meta device, where tensors have shapes alone ({type(error).__name__}: "
            f"{error}); load or initialise the weights first"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, flag in training.items():
            m.training = flag
