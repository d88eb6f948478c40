"""Layers as TensorFlow computes them, where PyTorch has none that is equal."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ... import ConvOperator, register_layer
from ...lipschitz.response_norm import response_norm_constant
from ...lipschitz.rules import Call, Constant, rule

Pads = tuple[int, int]


def same_pads(size: int, kernel: int, stride: int) -> Pads:
    """Padding (before, after) of one axis under SAME: ceil(size / stride) windows, the odd element after."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class FlattenNHWC(nn.Module):
    """(B, C, H, W) -> (B, H W C): the order in which a fully connected layer's published weights take their inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which depends on the input size and may be asymmetric.

    sn_fast knows its linear map, so it is normalised, measured and certified by its true operator.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size, stride, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.pads(x.shape[-2], x.shape[-1])
        if top == bottom and left == right:
            return F.conv2d(x, self.weight, self.bias, self.stride, (top, left))
        return F.conv2d(F.pad(x, (left, right, top, bottom)), self.weight, self.bias, self.stride)

    def pads(self, height: int, width: int) -> tuple[Pads, Pads]:
        """(before, after) of both axes for an input of this size."""
        (kernel_h, kernel_w), (stride_h, stride_w) = self.kernel_size, self.stride
        return same_pads(height, kernel_h, stride_h), same_pads(width, kernel_w, stride_w)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, padding=SAME"


def _operator(module: SameConv2d, weight: Tensor, input_size: tuple[int, int] | None) -> ConvOperator:
    if input_size is None:
        raise ValueError(
            "input_size of this SameConv2d is not known: give the spatial size of its input, e.g. (28, 28)"
        )
    return ConvOperator(weight, input_size, stride=module.stride, padding=module.pads(*input_size))


register_layer(SameConv2d, operator=_operator, default=True)  # type: ignore[arg-type]


class SameAvgPool2d(nn.Module):
    """Mean over the ``kernel_size`` x ``kernel_size`` window around each element, of those elements within the image.

    Stride 1, SAME padding: of an even window one more element lies after than before.
    """

    def __init__(self, kernel_size: int):
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        size = self.kernel_size
        means = F.avg_pool2d(x, size, 1, size // 2, count_include_pad=False)
        return means if size % 2 else means[..., 1:, 1:]  # the first windows of an even size start one too early

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}"


class LocalResponseNorm(nn.Module):
    """x / (bias + alpha * sum of x^2 over the channels within ``radius``)^beta; the defaults are AlexNet's.

    PyTorch's layer of this name divides alpha by the number of channels in the sum, and takes four times as long.
    """

    def __init__(self, radius: int = 4, bias: float = 1.0, alpha: float = 0.001 / 9, beta: float = 0.75):
        super().__init__()
        self.radius, self.bias, self.alpha, self.beta = radius, bias, alpha, beta

    def forward(self, x: Tensor) -> Tensor:
        window = 2 * self.radius + 1
        squares = (x * x).flatten(2).transpose(1, 2)  # channels last: the window slides along memory
        mean = F.avg_pool1d(squares, window, 1, self.radius).transpose(1, 2).reshape(x.shape)
        return x * (self.bias + self.alpha * window * mean).pow(-self.beta)

    def extra_repr(self) -> str:
        return f"radius={self.radius}, bias={self.bias:g}, alpha={self.alpha:g}, beta={self.beta:g}"


@rule(LocalResponseNorm)
def _local_response_norm(call: Call) -> float | Constant:
    call.allows("radius")
    return response_norm_constant(call.get("bias"), call.get("alpha"), call.get("beta"))


class ConstantDropout(nn.Dropout):
    """Dropout in training and in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, training=True)


def convolution(
    in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, padding: str = "SAME", bias: bool = True
) -> nn.Conv2d:
    """A convolution with padding "SAME" or "VALID"; PyTorch's own layer where that has this padding at every size."""
    if padding == "VALID" or kernel_size == 1:
        return nn.Conv2d(in_channels, out_channels, kernel_size, stride, bias=bias)
    if stride == 1 and kernel_size % 2:
        return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
    return SameConv2d(in_channels, out_channels, kernel_size, stride, bias)


def same_max_pool(kernel_size: int, stride: int, size: tuple[int, int]) -> nn.MaxPool2d:
    """Max pooling with SAME padding of an input of this size, by PyTorch's own layer; ``stride`` is 2 or more."""
    if stride < 2:
        raise ValueError(f"stride={stride}: SAME pooling by PyTorch's layer needs a stride of 2 or more")
    before = [same_pads(side, kernel_size, stride)[0] for side in size]
    # Where SAME has one more element after the image, the last window overhangs.
    return nn.MaxPool2d(kernel_size, stride, (before[0], before[1]), ceil_mode=True)


def flatten(channels: int, height: int, width: int) -> nn.Module:
    """``FlattenNHWC``, or PyTorch's own layer, which makes no copy, where there is no choice of order."""
    return nn.Flatten() if channels == 1 or height * width == 1 else FlattenNHWC()


def batch_norm(channels: int, *, momentum: float = 0.99, eps: float = 1e-3) -> nn.BatchNorm2d:
    """Batch normalisation with TensorFlow's defaults; ``momentum`` is the share of the old moving average."""
    return nn.BatchNorm2d(channels, eps=eps, momentum=1 - momentum)
