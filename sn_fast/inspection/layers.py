"""The layers of a model, the input sizes at which it uses them, and their norms."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import UserError, failures_explained, first_line, lacks_memory
from ..layers.describe import times, window
from ..layers.kinds import classes_of, kind_of, spatial_axes
from ..layers.linear import operator_of, raw_weight
from ..layers.observe import evaluating, observed_input_sizes
from ..layers.operators import LinearOperator
from ..layers.weighted import layer_operator
from ..norms import BoundInfo, operator_norm_interval
from ..running import progress_bar
from .weights import check_weight, quantized_layers

_REMEDY = "; leave it out with `exclude`, or give a smaller `input_size`"


@dataclass(frozen=True)
class LayerMeasurement:
    """One layer at one input size.

    Attributes:
        name, kind: path of the module, and its class.
        window: kernel, stride, dilation, groups of a convolution, or the shape of a matrix.
        input_size: spatial size of the input; None for matrices, and for convolutions that are not used.
        lower, upper: certified interval of the norm of the weight in use; None without an input size.
        certificate: how the upper end was found.
        reshaped: exact 2-norm of the kernel as a matrix (Cout, Cin k k), of convolutions alone; what
            torch.nn.utils.parametrizations.spectral_norm converges to.
        note: what is peculiar about the layer, or empty.
        tied: other layers with the same weight and the same norm.
        seconds: that its measurement took.
    """

    name: str
    kind: str
    window: str
    input_size: tuple[int, ...] | None = None
    lower: float | None = None
    upper: float | None = None
    certificate: BoundInfo | None = None
    reshaped: float | None = None
    note: str = ""
    tied: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def width(self) -> float | None:
        """Width of the interval, as a share of its lower end."""
        if self.lower is None or self.upper is None:
            return None
        return self.upper / self.lower - 1 if self.lower else (0.0 if self.upper == 0 else math.inf)

    @property
    def reshaped_error(self) -> float | None:
        """How far the reshaped kernel's norm is off the middle of the interval, as a share of that."""
        if self.lower is None or self.upper is None or self.reshaped is None or not self.upper:
            return None
        return self.reshaped / ((self.lower + self.upper) / 2) - 1


@dataclass(frozen=True)
class Inspection:
    """The layers of a model, in its order; a convolution used at several input sizes has a row for each.

    Attributes:
        unmeasured: names of other weights, with two dimensions or more.
        seconds: that all took.
    """

    layers: tuple[LayerMeasurement, ...]
    unmeasured: tuple[str, ...] = ()
    seconds: float = 0.0

    def measured(self) -> tuple[LayerMeasurement, ...]:
        return tuple(layer for layer in self.layers if layer.upper is not None)

    def largest(self) -> LayerMeasurement | None:
        return max(self.measured(), key=lambda layer: layer.upper or 0.0, default=None)

    def log10_product(self) -> float:
        """log10 of the product of the layers' upper bounds; of a layer's sizes the largest counts."""
        bounds: dict[str, float] = {}
        for layer in self.measured():
            bounds[layer.name] = max(bounds.get(layer.name, 0.0), layer.upper or 0.0)
        return sum(math.log10(bound) if bound else -math.inf for bound in bounds.values())


class _NotMeasured(Exception):
    """A layer has a map of its own that is not linear, or cannot be followed; the message says why."""


@dataclass
class _Use:
    name: str
    module: nn.Module
    input_size: tuple[int, ...] | None
    note: str = ""
    tied: list[str] = field(default_factory=list)


def inspect_model(
    model: nn.Module,
    input_size: Sequence[int],
    *,
    tol: float = 3e-3,
    include: str | None = None,
    exclude: str | None = None,
    progress: bool = False,
) -> Inspection:
    """Measure every Linear, Embedding and (transposed) convolution of ``model``, for the weights in use.

    Args:
        input_size: of the network's input without the batch, e.g. (3, 224, 224). The network is run once.
        tol: of Lanczos, which finds the lower ends.
        include, exclude: regular expressions on the layers' names.
        progress: show a bar on stderr, if tqdm is installed.

    Raises:
        UserError: no layer is left, a weight has no norm, or the network does not take such an input.
    """
    began = time.perf_counter()
    layers = _chosen(model, include, exclude)
    for name, module in layers.items():
        check_weight(name, module)
    with evaluating(model):
        sizes = _used_sizes(model, layers, tuple(input_size))
        with torch.no_grad():
            uses = _uses(layers, sizes)
            rows = []
            with progress_bar(progress and _has_tqdm(), "measuring", len(uses)) as bar:
                for use in uses:
                    bar.set_description_str(use.name, refresh=sys.stderr.isatty())
                    with failures_explained(f"layer {use.name}: measuring its norm failed", _REMEDY):
                        rows.append(_measured(use, tol))
                    bar.update(1)
            unmeasured = _unmeasured(model)
    return Inspection(tuple(rows), unmeasured, time.perf_counter() - began)


def _chosen(model: nn.Module, include: str | None, exclude: str | None) -> dict[str, nn.Module]:
    wanted, unwanted = _pattern("include", include), _pattern("exclude", exclude)
    layers: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, classes_of())}
    if not layers:
        quantized = (
            "; its quantised layers are not measured: give the model before it was" if quantized_layers(model) else ""
        )
        raise UserError(f"argument `model`: the model has no Linear, Embedding or convolution layer{quantized}")
    chosen = {
        name: module
        for name, module in layers.items()
        if (wanted is None or wanted.search(name)) and not (unwanted and unwanted.search(name))
    }
    if not chosen:
        argument = "include" if include is not None else "exclude"
        names = ", ".join([*list(layers)[:4], *(["..."] if len(layers) > 4 else [])])
        raise UserError(f"argument `{argument}`: no layer is left of {names}")
    return chosen


def _pattern(argument: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise UserError(f"argument `{argument}`: {text!r} is not a regular expression ({error})") from None


def _used_sizes(
    model: nn.Module, layers: Mapping[str, nn.Module], input_size: tuple[int, ...]
) -> dict[str, list[tuple[int, ...]]]:
    examples = [_noise]
    if any(isinstance(m, nn.Embedding) for m in model.modules()):
        examples.append(_indices)
    failure: BaseException | None = None
    for example in examples:
        try:
            return observed_input_sizes(model, layers, example(model, input_size))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a forward that is not ours can fail in any way
            if lacks_memory(error):
                raise UserError(
                    f"argument `input_size`: {times(input_size)} is too large: there is not enough memory for the "
                    f"model's run on one input ({first_line(error)}); give a smaller size"
                ) from error
            failure = error
    assert failure is not None
    raise UserError(
        f"argument `input_size`: the model does not take an input of size {times(input_size)} "
        f"({first_line(failure)}); give the size of its inputs, channels first{_taken(layers)}"
    ) from failure


def _noise(model: nn.Module, input_size: tuple[int, ...]) -> Tensor:
    """A batch of one random input, of the dtype and on the device of the model's parameters."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    noise = torch.rand(1, *input_size, generator=torch.Generator().manual_seed(0), device="cpu")
    floating = next((p.dtype for p in model.parameters() if p.is_floating_point()), noise.dtype)
    return noise.to(device, floating)


def _indices(model: nn.Module, input_size: tuple[int, ...]) -> Tensor:
    return torch.zeros(1, *input_size, dtype=torch.long, device=next(model.parameters()).device)


def _taken(layers: Mapping[str, nn.Module]) -> str:
    """What the first layer takes, as a hint."""
    name, first = next(iter(layers.items()))
    if isinstance(first, nn.Embedding):
        return f", e.g. 16 for 16 indices: layer {name} is an embedding"
    if isinstance(first, nn.Linear):
        return f", e.g. {first.in_features}: layer {name} takes {first.in_features} features"
    n = spatial_axes(first)
    channels = getattr(first, "in_channels", None)
    if not n or not isinstance(channels, int):
        return ""
    return f", e.g. {times((channels, *(32,) * n))}: layer {name} takes {channels} channels"


def _uses(layers: Mapping[str, nn.Module], sizes: Mapping[str, list[tuple[int, ...]]]) -> list[_Use]:
    """What to measure: every layer at each of its sizes, tied weights once."""
    uses: dict[Any, _Use] = {}
    for name, module in layers.items():
        if name not in sizes and spatial_axes(module):
            uses[name] = _Use(name, module, None, "not used")
            continue
        for size in dict.fromkeys(sizes.get(name, [()])):
            key: Any = (name, size)
            # The weight in use of a parametrized layer, or of one with a map of its own, is its own.
            if not parametrize.is_parametrized(module, "weight") and _own_map(module) is None:
                layer = layer_operator(_operator(name, module, size))
                key = key if layer is None else (id(module.weight), layer.geometry)
            note = "" if name in sizes else "its forward is not called"
            use = uses.setdefault(key, _Use(name, module, size or None, note))
            if use.name != name:
                use.tied.append(name)
    return list(uses.values())


def _operator(name: str, module: nn.Module, size: tuple[int, ...]) -> LinearOperator:
    try:
        return operator_of(module, size or None)
    except (ValueError, TypeError) as error:
        if _own_map(module) is not None:
            raise _NotMeasured(str(error.__cause__ or error)) from None
        raise UserError(f"layer {name}: {error}") from None


def _measured(use: _Use, tol: float) -> LayerMeasurement:
    began = time.perf_counter()
    kind = kind_of(use.module)
    assert kind is not None
    cls = parametrize.type_before_parametrizations(use.module).__name__
    weight = use.module.weight
    assert isinstance(weight, Tensor)
    shape = window(use.module) or times(weight.shape)
    row = LayerMeasurement(use.name, cls, shape, use.input_size, note=use.note, tied=tuple(use.tied))
    if use.input_size is None and kind.axes:
        row = replace(row, reshaped=_matrix_norm(kind.reshaped(weight)))
        return replace(row, seconds=time.perf_counter() - began)
    try:
        op = _operator(use.name, use.module, use.input_size or ())
    except _NotMeasured as error:
        note = "; ".join(filter(None, (use.note, f"not measured: {error}")))
        return replace(row, note=note, seconds=time.perf_counter() - began)
    try:
        lower, upper, info = operator_norm_interval(op, tol=tol, return_info=True)
    except ValueError as error:  # a raw weight that is finite can still give one in use that is not
        raise UserError(f"layer {use.name}: {error}") from None
    row = replace(row, lower=float(lower), upper=float(upper), certificate=info)
    layer = layer_operator(op)
    if layer is not None and layer.weight.ndim > 2:
        row = replace(row, reshaped=_matrix_norm(kind.reshaped(layer.weight)))
    if not info.certified:
        note = "a map of its own, known by its products alone: not certified"
        row = replace(row, note="; ".join(filter(None, (use.note, note))))
    return replace(row, seconds=time.perf_counter() - began)


def _own_map(module: nn.Module) -> str | None:
    """Why a layer is not the map of its class; None if it is."""
    kind = kind_of(module)
    return None if kind is None else kind.why_not_exact(module)


def _matrix_norm(matrix: Tensor) -> float:
    """Exact 2-norm, from the smaller Gram matrix in float64."""
    largest = float(matrix.abs().max())
    if not largest:
        return 0.0
    matrix = matrix.double() / largest
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1]))) * largest


def _unmeasured(model: nn.Module) -> tuple[str, ...]:
    """Weights of two dimensions or more, not counting those of size 1, that belong to no layer of a known class."""
    known = {id(raw_weight(m)) for m in model.modules() if isinstance(m, classes_of())}
    known |= {id(p) for m in model.modules() if isinstance(m, classes_of()) for p in m.parameters()}
    others = tuple(
        name for name, p in model.named_parameters() if sum(n > 1 for n in p.shape) >= 2 and id(p) not in known
    )
    return others + quantized_layers(model)


def _has_tqdm() -> bool:
    return importlib.util.find_spec("tqdm") is not None
