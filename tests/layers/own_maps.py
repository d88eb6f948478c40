"""Layers whose class, instance or hooks change the map of their kind; every make takes a class and its arguments."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

# (class, arguments, shape of an input)
KINDS: dict[str, tuple[type[nn.Module], tuple[Any, ...], dict[str, Any], tuple[int, ...]]] = {
    "linear": (nn.Linear, (6, 5), {}, (6,)),
    "conv1d": (nn.Conv1d, (3, 4, 3), {"padding": 1, "stride": 2}, (3, 9)),
    "conv2d": (nn.Conv2d, (2, 4, 3), {"padding": 1}, (2, 5, 6)),
    "conv2d, circular": (nn.Conv2d, (2, 4, 3), {"padding": 1, "padding_mode": "circular"}, (2, 5, 6)),
    "conv2d, groups": (nn.Conv2d, (4, 4, (3, 2)), {"groups": 2, "dilation": (1, 2)}, (4, 6, 5)),
    "conv3d": (nn.Conv3d, (2, 2, 2), {"padding": 1}, (2, 3, 3, 2)),
    "transposed1d": (nn.ConvTranspose1d, (3, 4, 3), {"stride": 2, "output_padding": 1}, (3, 5)),
    "transposed2d": (nn.ConvTranspose2d, (3, 2, 3), {"stride": 2, "padding": 1}, (3, 3, 4)),
    "transposed3d": (nn.ConvTranspose3d, (2, 2, 2), {"stride": 2}, (2, 2, 3, 2)),
}


def call(m: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """The layer's map with another weight."""
    if isinstance(m, nn.Linear):
        return F.linear(x, weight, m.bias)
    if isinstance(m, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        function = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}[weight.ndim]
        return function(x, weight, m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)
    return m._conv_forward(x, weight, m.bias)  # type: ignore[operator]


def standardised(w: Tensor) -> Tensor:
    dims = tuple(range(1, w.ndim))
    return (w - w.mean(dims, keepdim=True)) / torch.sqrt(w.var(dims, keepdim=True, unbiased=False) + 1e-6)


def fake_quantised(w: Tensor) -> Tensor:
    scale = w.abs().max() / 7
    return torch.fake_quantize_per_tensor_affine(w.float(), float(scale), 0, -8, 7).to(w)


def subclass(of_weight: Callable[[nn.Module, Tensor], Tensor]) -> Callable[..., nn.Module]:
    """A subclass whose forward uses a function of the weight."""

    def make(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        class Own(cls):  # type: ignore[valid-type, misc]
            def forward(self, x: Tensor) -> Tensor:
                return call(self, x, of_weight(self, self.weight))

        return Own(*args, **kwargs)

    return make


def merged_adapter(m: nn.Module, w: Tensor) -> Tensor:
    rows = w.flatten(1)
    a = torch.ones(len(rows), 2, dtype=w.dtype) * torch.arange(1, 3) / 3
    b = torch.linspace(-1, 1, 2 * rows.shape[1], dtype=w.dtype).reshape(2, -1)
    return w + (a.to(w) @ b).reshape(w.shape)


def adapter(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Low-rank adapter beside the layer, not merged."""

    class Adapted(cls):  # type: ignore[valid-type, misc]
        def __init__(self) -> None:
            super().__init__(*args, **kwargs)
            self.side = cls(*args, **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.5 * self.side(x)

    return Adapted()


def on_instance(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    m = cls(*args, **kwargs)
    m.forward = types.MethodType(lambda self, x: call(self, x, 5 * self.weight), m)  # type: ignore[method-assign]
    return m


def conv_forward_replaced(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    m = cls(*args, **kwargs)
    if hasattr(m, "_conv_forward"):
        own = m._conv_forward
        m._conv_forward = lambda x, w, b: own(x, 7 * w, b)  # type: ignore[operator]
    return m


def with_hooks(
    after: Callable[..., Any] | None = None, before: Callable[..., Any] | None = None
) -> Callable[..., nn.Module]:
    def make(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        m = cls(*args, **kwargs)
        if after is not None:
            m.register_forward_hook(after)
        if before is not None:
            m.register_forward_pre_hook(before)
        return m

    return make


def pruned(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    return prune.l1_unstructured(cls(*args, **kwargs), "weight", amount=0.4)


def pruned_twice(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    return prune.ln_structured(pruned(cls, *args, **kwargs), "weight", amount=0.5, n=2, dim=0)


def weight_normed_by_hook(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    return weight_norm(cls(*args, **kwargs))


def weight_normed(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    return parametrizations.weight_norm(cls(*args, **kwargs))


class Halved(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.tril() / 2 if w.ndim == 2 else w / 2


def parametrized(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    return parametrize.register_parametrization(cls(*args, **kwargs), "weight", Halved())  # type: ignore[return-value]


# Reduce to one convolution or matrix: certified as such.
OF_ONE_WEIGHT: dict[str, Callable[..., nn.Module]] = {
    "the same": subclass(lambda m, w: w),
    "standardised": subclass(lambda m, w: standardised(w)),
    "masked": subclass(lambda m, w: w * (torch.arange(w.numel()).reshape(w.shape) % 3 > 0)),
    "merged adapter": subclass(merged_adapter),
    "fake-quantised": subclass(lambda m, w: fake_quantised(w)),
    "unit rows": subclass(lambda m, w: F.normalize(w.flatten(1), dim=1).reshape(w.shape)),
    "on the instance": on_instance,
    "_conv_forward replaced": conv_forward_replaced,
    "output doubled": with_hooks(lambda m, i, o: 2 * o),
    "output shifted": with_hooks(lambda m, i, o: o + 3),
    "output negated": with_hooks(lambda m, i, o: -o),
    "hooks that look": with_hooks(lambda m, i, o: None, lambda m, i: None),
    "hook that keeps the mean": with_hooks(lambda m, i, o: vars(m).update(seen=o.detach().mean())),
    "pruned": pruned,
    "pruned twice": pruned_twice,
    "weight_norm by hook": weight_normed_by_hook,
    "weight_norm": weight_normed,
    "parametrized": parametrized,
}
# Linear, known by products.
BY_PRODUCTS: dict[str, Callable[..., nn.Module]] = {
    "adapter": adapter,
    "input doubled": with_hooks(before=lambda m, i: (2 * i[0],)),
    "input flipped": with_hooks(before=lambda m, i: (i[0].flip(-1),)),
    "channels scaled": with_hooks(lambda m, i, o: o.movedim(1, -1).mul(torch.arange(o.shape[1])).movedim(-1, 1)),
    "smoothed": with_hooks(lambda m, i, o: (o + o.roll(1, -1)) / 2),
    "written in place": with_hooks(lambda m, i, o: o.mul_(3).add_(o.flip(-1))),
}  # fmt: skip


def mean_weighted(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    class Dynamic(cls):  # type: ignore[valid-type, misc]
        def forward(self, x: Tensor) -> Tensor:
            return call(self, x, self.weight * x.mean())

    return Dynamic(*args, **kwargs)


class Dropped(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return F.dropout(w, 0.5)


NOT_LINEAR: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "relu": (with_hooks(lambda m, i, o: torch.relu(o)), "relu of its input is not known to be linear"),
    "clamped input": (with_hooks(before=lambda m, i: (i[0].clamp(-1, 1),)), "clamp of its input"),
    "weight of the input": (mean_weighted, "multiplies two tensors that depend on its input"),
    "gate": (with_hooks(lambda m, i, o: o * torch.sigmoid(i[0].mean())), "sigmoid of its input"),
    "branch": (with_hooks(lambda m, i, o: 2 * o if i[0].sum() > 0 else o), "not linear|branch"),
    "rounded": (with_hooks(lambda m, i, o: o.round()), "round of its input"),
    "integers": (with_hooks(lambda m, i, o: o.int().to(o)), "converted to torch.int32"),
    "several outputs": (with_hooks(lambda m, i, o: (o, o)), "returns a tuple"),
    "random weight": (subclass(lambda m, w: F.dropout(w, 0.5)), "changes from call to call|not linear"),
    "fails": (subclass(lambda m, w: w[:, :, None, None, None, None]), "its forward fails"),
}


def matrix_of(module: nn.Module, *shape: int) -> Tensor:
    """Of the module itself, column by column."""
    dtype = next(module.parameters()).dtype
    zero = torch.zeros(1, *shape, dtype=dtype)
    n = zero.numel()
    with torch.no_grad():
        images = torch.cat([module(unit) for unit in torch.eye(n, dtype=dtype).reshape(n, 1, *shape)])
        return (images - module(zero)).flatten(1).T.double()


def norm_of(module: nn.Module, *shape: int) -> float:
    return float(torch.linalg.matrix_norm(matrix_of(module, *shape), 2))
