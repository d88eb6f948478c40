"""A sequence of layers in the making, with the shape of what each of them returns."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import nn

from .layers import convolution, flatten, same_max_pool


class Stack:
    """Adds layers by name; ``shape`` is that of the last one's output without the batch: (C, H, W) or (features,).

    Raises:
        ValueError: by every method, where the images are too small for a layer.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        self.image_shape = image_shape
        self.shape: tuple[int, ...] = image_shape
        self.layers: dict[str, nn.Module] = {}

    def add(self, name: str, module: nn.Module, shape: tuple[int, ...] | None = None) -> None:
        """A layer that returns ``shape``; None: that of its input."""
        self.layers[name] = module
        self.shape = shape or self.shape

    def conv(
        self, name: str, channels: int, kernel: int, *, stride: int = 1, padding: str = "SAME", bias: bool = True
    ) -> None:
        size = self._size_after(name, kernel, stride, padding)
        _check_width(name, channels)
        layer = convolution(self.shape[0], channels, kernel, stride=stride, padding=padding, bias=bias)
        self.add(name, layer, (channels, *size))

    def max_pool(self, name: str, kernel: int, stride: int, padding: str = "VALID") -> None:
        size = self._size_after(name, kernel, stride, padding)
        same = padding == "SAME"
        layer = same_max_pool(kernel, stride, self.shape[1:]) if same else nn.MaxPool2d(kernel, stride)  # type: ignore[arg-type]
        self.add(name, layer, (self.shape[0], *size))

    def linear(self, name: str, features: int) -> None:
        """Fully connected; images are flattened first, in the published order."""
        _check_width(name, features)
        if len(self.shape) == 3:
            self.add("flatten", flatten(*self.shape), (math.prod(self.shape),))
        self.add(name, nn.Linear(self.shape[0], features), (features,))

    def network(self) -> nn.Sequential:
        return nn.Sequential(OrderedDict(self.layers))

    def _size_after(self, name: str, kernel: int, stride: int, padding: str) -> tuple[int, ...]:
        size = self.shape[1:]
        if padding == "SAME":
            return tuple(-(-side // stride) for side in size)
        if min(size) < kernel:
            images = " x ".join(map(str, self.image_shape[1:]))
            raise ValueError(
                f"image_size: {images} is too small; layer {name!r} takes windows of {kernel} x {kernel} from "
                f"{' x '.join(map(str, size))}"
            )
        return tuple((side - kernel) // stride + 1 for side in size)


def _check_width(name: str, width: int) -> None:
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise ValueError(f"layer {name!r} cannot have {width!r} units or channels; give an integer >= 1")
