"""The registry of layer kinds: for each class of layers how its linear map is made, and all else that depends on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .exact import why_not_its_class
from .operators import LinearOperator
from .weighted import ConvOperator, MatrixOperator, conv_pads, per_axis

_NOMINAL_OUTPUTS = 12

Size = tuple[int, ...]
MakeOperator = Callable[[nn.Module, Tensor, Any], LinearOperator]
ModuleClass = TypeVar("ModuleClass", bound=type[nn.Module])


@dataclass(frozen=True)
class LayerKind:
    """What sn_fast knows of a class of layers.

    Attributes:
        name: for people: "matrix", "conv", "transposed conv".
        classes: the classes that it serves, with their subclasses as far as these have no kind of their own.
        make: (module, weight, input_size) -> the layer's operator with this weight in place of its own; input_size is
            None where ``axes`` is 0.
        axes: number of spatial axes, the last of the layer's input.
        default: whether ``apply_spectral_norm`` normalises these layers where ``include`` does not say.
        matrix_dim: the dimension of the weight that gives the rows of the reshaped matrix, as in
            torch.nn.utils.parametrizations.spectral_norm.
        input_shape: (module, input_size) -> shape of one input of floating point; None for indices.
        whole_window_size, nominal_size: see the functions of these names; None where the map at one input size says
            nothing about others.
        table_size: (module) -> number of indices, for a kind whose input is indices.
        why_not: (module) -> why its settings do not make the map of ``make``; None if they do.
        of_user: registered by ``register_layer``.
    """

    name: str
    classes: tuple[type[nn.Module], ...]
    make: MakeOperator
    axes: int = 0
    default: bool = False
    matrix_dim: int = 0
    input_shape: Callable[[nn.Module, Size], Size] | None = None
    whole_window_size: Callable[[nn.Module], tuple[int | None, ...]] | None = None
    nominal_size: Callable[[nn.Module], Size] | None = None
    table_size: Callable[[nn.Module], int] | None = None
    why_not: Callable[[nn.Module], str | None] | None = None
    of_user: bool = False

    def operator(self, module: nn.Module, weight: Tensor, input_size: int | Sequence[int] | None) -> LinearOperator:
        """The layer's operator with this weight; ``input_size`` is that of its input where it has spatial axes."""
        size = (
            per_axis("input_size", input_size, self.axes, minimum=1) if self.axes and input_size is not None else None
        )
        op = self.make(module, weight, size)
        if not isinstance(op, LinearOperator):
            raise TypeError(
                f"register_layer: operator of {self.classes[0].__name__} returned a {type(op).__name__}; "
                "it must return a LinearOperator"
            )
        return op

    def why_not_exact(self, module: nn.Module, *, hooks: bool = True) -> str | None:
        """Why a module is not exactly the map of its kind, with its weight in use; None if it is.

        Its class, attributes, or (unless ``hooks`` is False) hooks may change what it computes.
        """
        known = next(c for c in type(module).__mro__ if c in self.classes)
        reason = why_not_its_class(module, hooks=hooks, known=known)
        return self.why_not(module) if reason is None and self.why_not is not None else reason

    def reshaped(self, weight: Tensor) -> Tensor:
        """The weight as a matrix, rows first, as torch.nn.utils.parametrizations.spectral_norm takes it."""
        return weight.movedim(self.row_dim(weight.shape), 0).flatten(1)

    def row_dim(self, shape: Sequence[int]) -> int:
        """``matrix_dim``, of a weight of this shape.

        Raises:
            ValueError: the weight has no such dimension.
        """
        if self.matrix_dim >= len(shape):
            raise ValueError(
                f"register_layer: matrix_dim={self.matrix_dim} of {self.classes[0].__name__}, whose weight has shape "
                f"{tuple(shape)}; give one of its dimensions, 0 to {len(shape) - 1}"
            )
        return self.matrix_dim


_KINDS: dict[type[nn.Module], LayerKind] = {}


def kind_of(module: nn.Module) -> LayerKind | None:
    """The kind of a layer, by its class or the nearest base class that has one."""
    for c in type(module).__mro__:  # a loop: torch 2.7 compiles no next() of a generator
        if c in _KINDS:
            return _KINDS[c]
    return None


def classes_of(*names: str) -> tuple[type[nn.Module], ...]:
    """The classes of the kinds of these names, or of all."""
    return tuple(c for c, kind in _KINDS.items() if not names or kind.name in names)


def spatial_axes(module: nn.Module) -> int:
    """Number of spatial axes of the layer's input; 0 for all but convolutions and the like."""
    kind = kind_of(module)
    return kind.axes if kind is not None else 0


def whole_window_size(module: nn.Module) -> tuple[int | None, ...]:
    """Per axis, an input size at which some output sees every tap, if windows never overlap there; else None.

    Along such an axis the norm does not depend on the input size.
    """
    kind = kind_of(module)
    assert kind is not None
    return (None,) * kind.axes if kind.whole_window_size is None else kind.whole_window_size(module)


def nominal_size(module: nn.Module) -> Size:
    """An input size at which some output sees every tap, the last window ends with the padding, and which is small.

    Stands for every size where the size does not matter.
    """
    kind = kind_of(module)
    assert kind is not None
    if kind.nominal_size is None:
        raise ValueError(
            f"input_size='any': the operator of {type(module).__name__} is known at one input size at a time; give "
            "that, or nominal_size= to register_layer"
        )
    return kind.nominal_size(module)


def conv_operator(module: nn.Module, weight: Tensor, input_size: int | Sequence[int]) -> ConvOperator:
    """The operator of a convolution layer with this weight in place of its own."""
    kind = kind_of(module)
    assert kind is not None
    op = kind.operator(module, weight, input_size)
    return op  # type: ignore[return-value]


def register_layer(
    cls: ModuleClass,
    *,
    operator: MakeOperator,
    default: bool = False,
    spatial_axes: int | None = None,
    matrix_dim: int | None = None,
    name: str | None = None,
    input_shape: Callable[[nn.Module, Size], Size] | None = None,
    nominal_size: Callable[[nn.Module], Size] | None = None,
) -> ModuleClass:
    """Register how the linear map of a layer class is made, for ``operator_of``, ``sn-fast norms``, ``spectral_norm``
    and ``apply_spectral_norm``.

    >>> class ScaledConv(nn.Conv2d):  # a convolution with a fixed gain, which torch's own class does not have
    ...     def forward(self, x):
    ...         return self._conv_forward(x, self.gain * self.weight, self.bias)
    >>> register_layer(
    ...     ScaledConv,
    ...     operator=lambda m, weight, size: ConvOperator(m.gain * weight, size, stride=m.stride, padding=m.padding),
    ... )

    The layer can be measured whatever its operator is. It can be normalised where that has the parameter, or a linear
    function of it, for its weight, since the parametrization divides the parameter; ``spectral_norm`` refuses other
    layers with the reason (docs/layers.md).

    Args:
        cls: a subclass of torch.nn.Module, served with its subclasses. Registering it again replaces what was said.
        operator: (module, weight, input_size) -> LinearOperator, the layer's linear map with this weight, of the shape
            of ``module.weight``, in place of its own. input_size is a tuple, or None without spatial axes.
        default: whether ``apply_spectral_norm`` normalises these layers where ``include`` does not say.
        spatial_axes: how many of the last axes of the layer's input are spatial, its input_size. None: as the base
            class that has a kind, or 0.
        matrix_dim: see ``LayerKind``. None: as the base class, or 0.
        name: of the operator in tables. None: as the base class, or the name of the class.
        input_shape: (module, input_size) -> shape of one input without the batch. None: that of the operator.
        nominal_size: (module) -> an input size at which every tap is read; allows ``input_size="any"``, which takes for
            granted that the layer is a convolution whose settings do not depend on the input size.

    Returns:
        ``cls``.

    Raises:
        TypeError: an argument is of another type. ValueError: cls is a layer of PyTorch that has a kind, or a number
            is negative.
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise TypeError(f"cls={cls!r}: give a subclass of torch.nn.Module")
    if not callable(operator):
        raise TypeError(f"operator={operator!r} must be a function (module, weight, input_size) -> LinearOperator")
    known = _KINDS.get(cls)
    if known is not None and not known.of_user:
        raise ValueError(f"{cls.__name__} is a layer that sn_fast knows ({known.name}); register a subclass of it")
    base = next((_KINDS[c] for c in cls.__mro__[1:] if c in _KINDS), None)
    axes = spatial_axes if spatial_axes is not None else base.axes if base is not None else 0
    if isinstance(axes, bool) or not isinstance(axes, int) or axes < 0:
        raise ValueError(f"spatial_axes={spatial_axes!r} must be an integer >= 0")
    rows = matrix_dim if matrix_dim is not None else base.matrix_dim if base is not None else 0
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
        raise ValueError(f"matrix_dim={matrix_dim!r} must be an integer >= 0, a dimension of the weight")
    _KINDS[cls] = LayerKind(
        name or (base.name if base is not None else cls.__name__),
        (cls,),
        operator,
        axes,
        bool(default),
        rows,
        input_shape,
        nominal_size=nominal_size,
        of_user=True,
    )
    return cls


def unregister_layer(cls: type[nn.Module]) -> None:
    """Take back ``register_layer(cls)``."""
    if cls in _KINDS and _KINDS[cls].of_user:
        del _KINDS[cls]


def _add(kind: LayerKind) -> None:
    for cls in kind.classes:
        assert cls not in _KINDS, f"{cls.__name__} has a kind already"
        _KINDS[cls] = kind


# -- linear -----------------------------------------------------------------------------------------------------------


def _features(module: Any, _: Size) -> Size:
    return (module.in_features,)


def _matrix(module: nn.Module, weight: Tensor, _: Size | None) -> LinearOperator:
    return MatrixOperator(weight)


_add(
    LayerKind(
        "matrix",
        (nn.Linear,),
        _matrix,
        default=True,
        input_shape=_features,
    )
)


# -- embeddings: the map from one-hot vectors, or counts, to rows -----------------------------------------------------


def _table(module: Any, weight: Tensor, _: Size | None) -> LinearOperator:
    if getattr(module, "mode", "sum") == "max":
        raise ValueError("EmbeddingBag(mode='max') is not a linear map; modes 'sum' and 'mean' are")
    if module.max_norm is not None:  # rows are cut when they are looked up, as torch.embedding_renorm_ does it
        norms = torch.linalg.vector_norm(weight, ord=module.norm_type, dim=1, keepdim=True)
        weight = torch.where(norms > module.max_norm, weight * (module.max_norm / (norms + 1e-7)), weight)
    return MatrixOperator(weight.T)


def _rows(module: Any) -> int:
    rows: int = module.num_embeddings
    return rows


_add(LayerKind("matrix", (nn.Embedding,), _table, table_size=_rows))
# Of a bag: the map from the counts of indices (mode "sum"), or from their shares ("mean").
_add(LayerKind("matrix", (nn.EmbeddingBag,), _table))


# -- convolutions -----------------------------------------------------------------------------------------------------


def _convolution(module: Any, weight: Tensor, input_size: Size | None) -> LinearOperator:
    if input_size is None:
        raise ValueError(
            f"input_size of this {type(module).__name__} is not known: give the spatial size of its input, "
            "e.g. input_size=(32, 32)"
        )
    return ConvOperator(
        weight,
        input_size,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        padding_mode=module.padding_mode,
        transposed=module.transposed,
        output_padding=module.output_padding,
    )


def _conv_input_shape(module: Any, input_size: Size) -> Size:
    return (module.in_channels, *input_size)


def _conv_whole_window_size(module: Any) -> tuple[int | None, ...]:
    sizes: list[int | None] = []
    for i, (kernel, stride, dilation) in enumerate(zip(module.kernel_size, module.stride, module.dilation)):
        extent = dilation * (kernel - 1) + 1
        padding = 0 if isinstance(module.padding, str) else module.padding[i]
        separate = extent <= stride and (padding == 0 or module.padding_mode == "zeros")
        sizes.append(extent + stride + 2 * padding + 3 if separate else None)
    return tuple(sizes)


def _conv_nominal_size(module: Any) -> Size:
    pads = conv_pads(module.padding, module.kernel_size, module.stride, module.dilation, module.transposed)
    sizes = []
    for whole, kernel, stride, dilation, pad in zip(
        _conv_whole_window_size(module), module.kernel_size, module.stride, module.dilation, pads
    ):
        if whole is not None or module.transposed:
            sizes.append(whole or _NOMINAL_OUTPUTS)
            continue
        extent = dilation * (kernel - 1) + 1
        least = extent + sum(pad) + 1
        sizes.append(least + (extent - sum(pad) - least) % stride + _NOMINAL_OUTPUTS * stride)
    return tuple(sizes)


def _why_not_padded(module: Any) -> str | None:
    """A padding other than zeros is read from an attribute that the constructor derives from ``padding``."""
    if module.padding_mode == "zeros":
        return None
    pads = conv_pads(module.padding, module.kernel_size, module.stride, module.dilation, module.transposed)
    if list(module._reversed_padding_repeated_twice) == [p for pair in reversed(pads) for p in pair]:
        return None
    return "its padding was changed after it was made"


_CONVOLUTION = LayerKind(
    "conv",
    (),
    _convolution,
    default=True,
    input_shape=_conv_input_shape,
    whole_window_size=_conv_whole_window_size,
    nominal_size=_conv_nominal_size,
    why_not=_why_not_padded,
)
# As torch does it, the rows of a reshaped kernel are output channels.
_TRANSPOSED = replace(_CONVOLUTION, name="transposed conv", matrix_dim=1)
_add(replace(_CONVOLUTION, classes=(nn.Conv1d,), axes=1))
_add(replace(_CONVOLUTION, classes=(nn.Conv2d,), axes=2))
_add(replace(_CONVOLUTION, classes=(nn.Conv3d,), axes=3))
_add(replace(_TRANSPOSED, classes=(nn.ConvTranspose1d,), axes=1))
_add(replace(_TRANSPOSED, classes=(nn.ConvTranspose2d,), axes=2))
_add(replace(_TRANSPOSED, classes=(nn.ConvTranspose3d,), axes=3))
