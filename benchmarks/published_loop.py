"""The published power iteration (Farnia et al. 2019, sn.py) in plain PyTorch, layer by layer: what to compare with.

Per layer and iteration: v = A u / |A u|, u = A^T v / |A^T v|, sigma = <A u, v>: three applications, in the space of the
layer's own input. The adjoint of a strided convolution needs an output_padding, per axis (size + 2 padding - extent)
mod stride.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1e-12


class PublishedLayer:
    """One convolution or linear layer, and the vector ``u`` that its iteration keeps (the layer's input space)."""

    def __init__(self, module: nn.Conv2d | nn.Linear, input_shape: Sequence[int]) -> None:
        self.weight = module.weight.detach()
        self.conv = module if isinstance(module, nn.Conv2d) else None
        shape = input_shape if self.conv is not None else input_shape[-1:]
        self.u = torch.randn(1, *shape, device=self.weight.device, dtype=self.weight.dtype)
        if self.conv is not None:
            padding = [int(p) for p in self.conv.padding]
            self.options = (list(self.conv.stride), padding, list(self.conv.dilation), self.conv.groups)
            sizes = zip(input_shape[1:], self.conv.kernel_size, self.conv.stride, padding, self.conv.dilation)
            self.output_padding = [(n + 2 * p - d * (k - 1) - 1) % s for n, k, s, p, d in sizes]

    def matvec(self, weight: Tensor, u: Tensor) -> Tensor:
        """A u."""
        if self.conv is None:
            return F.linear(u, weight)
        stride, padding, dilation, groups = self.options
        return F.conv2d(u, weight, None, stride, padding, dilation, groups)

    def rmatvec(self, weight: Tensor, v: Tensor) -> Tensor:
        """A^T v."""
        if self.conv is None:
            return v @ weight
        stride, padding, dilation, groups = self.options
        return F.conv_transpose2d(v, weight, None, stride, padding, self.output_padding, groups, dilation)

    def step(self, weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration: sigma and the new u."""
        v = _unit(self.matvec(weight, u))
        u = _unit(self.rmatvec(weight, v))
        return (self.matvec(weight, u) * v).sum(), u


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum().sqrt() + _EPS)


class PublishedLoop:
    """The iteration of every layer of a model. ``weights`` are the model's own tensors."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.layers = [PublishedLayer(m, shape) for m, shape in input_shapes(model, example).items()]
        self.weights = [layer.weight for layer in self.layers]
        self.us = [layer.u for layer in self.layers]

    def iterate(self, weights: Sequence[Tensor], us: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """One iteration of every layer, as a function: sigmas, new us."""
        steps = [layer.step(w, u) for layer, w, u in zip(self.layers, weights, us)]
        return [sigma for sigma, _ in steps], [u for _, u in steps]

    @torch.no_grad()
    def refresh(self) -> list[Tensor]:
        """One iteration of every layer, in place."""
        sigmas, us = self.iterate(self.weights, self.us)
        for old, new in zip(self.us, us):
            old.copy_(new)
        return sigmas

    def normalise(self, weights: Sequence[Tensor], beta: float = 1.0) -> list[Tensor]:
        """W / max(1, sigma / beta) of every layer after one iteration, differentiable through it, as published."""
        sigmas, _ = self.iterate(weights, self.us)
        return [w / (sigma / beta).clamp(min=1.0) for w, sigma in zip(weights, sigmas)]


class PublishedNorm(nn.Module):
    """The same of one layer as a parametrization of its weight: every use in training takes a step."""

    u: Tensor

    def __init__(self, layer: PublishedLayer) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("u", layer.u)

    def forward(self, weight: Tensor) -> Tensor:
        """W / max(1, sigma), in float32 also under autocast, as published."""
        with torch.autocast(weight.device.type, enabled=False):
            sigma, u = self.layer.step(weight, self.u.clone())  # autograd keeps it, and the next line writes it
            if self.training:
                with torch.no_grad():
                    self.u.copy_(u)
            return weight / sigma.clamp(min=1.0)


def apply_published_norm(model: nn.Module, example: Tensor) -> nn.Module:
    """Every convolution and linear layer normalised as published, layer by layer."""
    found = input_shapes(model, example)
    for module, shape in found.items():
        layer = PublishedLayer(module, shape)
        nn.utils.parametrize.register_parametrization(module, "weight", PublishedNorm(layer))
    return model


def input_shapes(model: nn.Module, example: Tensor) -> dict[nn.Conv2d | nn.Linear, tuple[int, ...]]:
    """Of every convolution and linear layer, in the order of their first use."""
    shapes: dict[nn.Conv2d | nn.Linear, tuple[int, ...]] = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, args: shapes.__setitem__(m, tuple(args[0].shape[1:])))
        for m in model.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return shapes
