"""How much each layer amplifies a perturbation, sample by sample, beside the most that its norm allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attacks.arguments import check_like, check_samples
from ..attacks.gradient import guarded
from ..layers.describe import aligned
from ..layers.kinds import classes_of, spatial_axes
from ..layers.linear import operator_of
from ..lipschitz.graph import unwrapped
from ..norms import operator_norm
from .gradients import sample_norms

_LEAST = 1e-12  # gains below count as this in their logarithms


@dataclass(frozen=True)
class Amplification:
    """Gains of a perturbation in the linear layers of a network, in the order of use.

    Attributes:
        layers: paths of the modules; "name (2)" for a second use in a forward.
        norms: (layers,), ||W||_2 of each layer's true linear map at its input size, which its gain cannot exceed.
        gain: (N, layers), ||layer(x + d) - layer(x)|| / ||difference of the layer's inputs||; 0 where no difference
            arrives, as where d is 0; NaN where an activation is not finite.
        cumulative: (N, layers), ||difference of the layer's outputs|| / ||d||.
        logits: (N, ...), outputs of the network at x.
    """

    layers: tuple[str, ...]
    norms: Tensor
    gain: Tensor
    cumulative: Tensor
    logits: Tensor

    @property
    def signals(self) -> Tensor:
        """(N, layers): log of the cumulative gain, with gains below 1e-12 counted as that; finite."""
        return log_gains(self.cumulative)

    @property
    def share(self) -> Tensor:
        """(N, layers): gain / norm, at most 1 up to rounding; 0 of a layer with norm 0."""
        return torch.where(self.norms > 0, self.gain / torch.where(self.norms > 0, self.norms, 1.0), 0.0)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "norm", "gain: mean", "largest", "cumulative: mean", "largest")]
        for i, name in enumerate(self.layers):
            columns = (self.gain[:, i], self.cumulative[:, i])
            cells = [f"{float(v):.4g}" for c in columns if len(c) for v in (c.mean(), c.max())]
            rows.append((name, f"{float(self.norms[i]):.4g}", *(cells or ["-"] * 4)))
        return "\n".join(aligned(rows, frozenset(range(1, 6))))


class Gains(NamedTuple):
    """What one doubled pass shows; ``uses`` are the layers with the spatial size of their input."""

    names: tuple[str, ...]
    uses: tuple[tuple[nn.Module, tuple[int, ...]], ...]
    gain: Tensor
    cumulative: Tensor
    logits: Tensor


def amplification(model: nn.Module, x: Tensor, delta: Tensor) -> Amplification:
    """Measure how each linear layer of ``model`` amplifies the perturbation ``delta`` of ``x``.

    One forward of x and x + delta together, in eval mode, with hooks on the Linear, convolution and registered layers.
    Differences of float32 activations are right to about 1e-6 of the activations, not of the difference: take
    perturbations above 1e-3 of x, or float64.

    Args:
        model: any network of such layers, branched ones too, that keeps the batch in the first dimension. Left as it
            was.
        x: (N, *size), floating point.
        delta: of the shape, dtype and device of x, l2 length in the units of x.

    Returns:
        The gains, without gradients, in the dtype of x, float32 at least.

    Raises:
        TypeError: ``model`` is no module, or x or delta no floating-point tensor.
        ValueError: delta does not fit x; no layer is run; a layer's outputs are not in rows of samples.
    """
    model = check_model(model)
    with guarded(model, "eval", True, False):
        found = doubled_pass(model, x, delta)
        norms = torch.stack([_norm(module, size) for module, size in found.uses]).to(found.gain)
    return Amplification(found.names, norms, found.gain, found.cumulative, found.logits)


def check_model(model: nn.Module) -> nn.Module:
    """The module whose layers can be hooked: that inside wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give a torch.nn.Module")
    return unwrapped(model)


def doubled_pass(model: nn.Module, x: Tensor, delta: Tensor) -> Gains:
    """Gains by one forward in the mode that the model is in; differentiable where autograd is on."""
    check_samples(x)
    check_like("delta", delta, x)
    if not len(x):
        raise ValueError("x has no samples")
    recorder = _Recorder(len(x))
    with recorder.attached(model):
        logits = model(torch.cat((x, x + delta)))
    if not isinstance(logits, Tensor) or logits.shape[:1] != (2 * len(x),):
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return a tensor with a row per sample, got {found} for {2 * len(x)} samples")
    return recorder.gains(sample_norms(delta), logits[: len(x)])


@dataclass
class _Use:
    """One call of a layer, and the lengths (N,) of the differences that it is given and returns."""

    name: str
    module: nn.Module
    size: tuple[int, ...]
    given: Tensor
    returned: Tensor | None = None


class _Recorder:
    """Watches the layers in a forward of two halves, each of n samples."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._uses: list[_Use] = []
        self._open: list[_Use | None] = []  # calls that have not returned: a layer may have others inside

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        handles = []
        try:
            for name, module in model.named_modules():
                if isinstance(module, classes_of()):
                    handles.append(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
                    handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Differences are taken at once: what follows may write into the tensors.
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        use = None
        if x is not None and x.is_floating_point():  # not an embedding's indices
            axes = spatial_axes(module)
            use = _Use(name, module, tuple(x.shape[x.ndim - axes :]) if axes else (), self._difference(x, name))
            self._uses.append(use)
        self._open.append(use)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        use = self._open.pop()
        if use is not None:
            use.returned = self._difference(out, use.name)

    def _difference(self, value: Any, name: str) -> Tensor:
        """l2 norms (N,) of the differences of the two halves of a batch."""
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] % (2 * self._n):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"layer {name!r} is given or returns {found}, not rows of {2 * self._n} samples")
        first, second = value.reshape(2, self._n, -1)
        return sample_norms(second - first)

    def gains(self, lengths: Tensor, logits: Tensor) -> Gains:
        if not self._uses:
            raise ValueError("the model runs no Linear, convolution or registered layer: nothing is amplified")
        given = torch.stack([use.given for use in self._uses], dim=1)
        returned = torch.stack([use.returned for use in self._uses if use.returned is not None], dim=1)
        # The halves of a batch are rounded differently: without a perturbation too they differ a little.
        moved = lengths[:, None].to(given) != 0
        given, returned = torch.where(moved, given, 0.0), torch.where(moved, returned, 0.0)
        return Gains(
            _numbered([use.name for use in self._uses]),
            tuple((use.module, use.size) for use in self._uses),
            _quotient(returned, given),
            _quotient(returned, lengths[:, None].to(returned)),
            logits,
        )


def log_gains(gains: Tensor) -> Tensor:
    """Logarithms, finite."""
    return gains.clamp_min(_LEAST).log()


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is, and NaN where one of them is."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _numbered(names: list[str]) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    numbered = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        numbered.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return tuple(numbered)


def _norm(module: nn.Module, size: tuple[int, ...]) -> Tensor:
    norm = operator_norm(operator_of(module, size or None))
    assert isinstance(norm, Tensor)
    return norm
