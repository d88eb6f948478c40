"""Ways to normalise a whole network, each as the users of its package do it: what is timed, and what it divides by."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sn_fast

from ..peers import NotOffered
from ..published_loop import apply_published_norm

_TOL = 1e-3


def _nothing() -> None: ...


@dataclass
class Normalised:
    """A network that one method has made its own.

    Attributes:
        refresh: the method's work for new norms of all layers, once their weights have changed.
        raw, weights: of each layer, by the names that it had before, the parameter that an optimizer changes, and the
            weight that the network computes with.
        before_step, after_step: what a training loop has to call around a step.
    """

    model: nn.Module
    refresh: Callable[[], Any]
    raw: Mapping[str, Tensor]
    weights: Callable[[], Mapping[str, Tensor]]
    before_step: Callable[[], Any] = _nothing
    after_step: Callable[[], Any] = _nothing


Apply = Callable[[nn.Module, Tensor], Normalised]


@dataclass(frozen=True)
class Method:
    """One row. ``true_norm``: whether what it divides by is the norm of the layer's own linear map."""

    apply: Apply
    computes: str
    true_norm: bool | None
    package: str = ""


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The layers that all methods normalise."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def _parametrized(model: nn.Module, refresh: Callable[[], Any]) -> Normalised:
    layers = layers_of(model)

    @torch.no_grad()
    def weights() -> dict[str, Tensor]:
        training = model.training
        model.eval()  # here a look is no iteration
        found = {name: m.weight.clone() for name, m in layers.items()}
        model.train(training)
        return found

    raw = {name: m.parametrizations.weight.original for name, m in layers.items()}
    return Normalised(model, refresh, raw, weights)


def _look(layers: Mapping[str, Any]) -> Callable[[], None]:
    """In training each look at a weight is an iteration."""

    @torch.no_grad()
    def refresh() -> None:
        for m in layers.values():
            _ = m.weight

    return refresh


def _none(model: nn.Module, example: Tensor) -> Normalised:
    raw = {name: m.weight for name, m in layers_of(model).items()}
    return Normalised(model, _nothing, raw, lambda: raw)


def _sn_fast(**options: Any) -> Apply:
    def apply(model: nn.Module, example: Tensor) -> Normalised:
        accepted = inspect.signature(sn_fast.apply_spectral_norm).parameters
        if "tol" in options and "tol" not in accepted:
            raise NotOffered("tol= in this version")
        sn_fast.apply_spectral_norm(model, example, **options)
        return _parametrized(model, lambda: sn_fast.update_spectral_norm(model))

    return apply


def _projection(**options: Any) -> Apply:
    def apply(model: nn.Module, example: Tensor) -> Normalised:
        projection = sn_fast.SpectralProjection(model, example, **options)
        raw = {name: m.weight for name, m in layers_of(model).items()}
        return Normalised(model, projection.step, raw, lambda: raw, after_step=projection.step)

    return apply


def _torch(model: nn.Module, example: Tensor) -> Normalised:
    layers = layers_of(model)
    for m in layers.values():
        parametrizations.spectral_norm(m)
    return _parametrized(model, _look(layers))


def _published(model: nn.Module, example: Tensor) -> Normalised:
    layers = layers_of(model)
    apply_published_norm(model, example)
    return _parametrized(model, _look(layers))


def _torchlip(model: nn.Module, example: Tensor) -> Normalised:
    """Its layers without the Björck step, after which no one number is left that the weight was divided by."""
    from deel import torchlip

    made: dict[str, Any] = {}
    for name, m in layers_of(model).items():
        if isinstance(m, nn.Linear):
            new = torchlip.SpectralLinear(m.in_features, m.out_features, bias=m.bias is not None, eps_bjorck=None)
        else:
            new = torchlip.SpectralConv2d(**_conv_options(m), bias=m.bias is not None, eps_bjorck=None)
        with torch.no_grad():
            new.parametrizations.weight.original.copy_(m.weight)
        made[name] = _replace(model, name, new)
    return _parametrized(model, _look(made))


def _normflows(model: nn.Module, example: Tensor) -> Normalised:
    """The tolerance that its documentation calls typical; norms move between the steps, as in its examples."""
    from normflows.nets import lipschitz

    tolerance = {"atol": _TOL, "rtol": _TOL}
    made: dict[str, Any] = {}
    for name, m in layers_of(model).items():
        bias = m.bias is not None
        if isinstance(m, nn.Linear):
            new = lipschitz.InducedNormLinear(m.in_features, m.out_features, bias=bias, **tolerance)
        else:
            options = {k: v for k, v in _conv_options(m).items() if k not in ("dilation", "groups", "padding_mode")}
            new = lipschitz.InducedNormConv2d(**options, bias=bias, **tolerance)
        with torch.no_grad():
            new.weight.copy_(m.weight)
        made[name] = _replace(model, name, new)
    model(example)  # the layers see the sizes of their inputs

    @torch.no_grad()
    def refresh() -> None:
        for m in made.values():
            m.compute_weight(update=True)

    @torch.no_grad()
    def weights() -> dict[str, Tensor]:
        return {name: m.weight / m.scale for name, m in made.items()}

    return Normalised(model, refresh, {n: m.weight for n, m in made.items()}, weights, before_step=refresh)


def _orthogonium(model: nn.Module, example: Tensor) -> Normalised:
    raise NotOffered("normalisation of a given layer: its layers are orthogonal by construction")


def _conv_options(m: nn.Conv2d) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(m, name) for name in names}


def _replace(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
    return new


METHODS: dict[str, Method] = {
    "no SN": Method(_none, "nothing", None),
    "sn_fast": Method(_sn_fast(), "apply_spectral_norm: one power iteration of the layer's map per change", True),
    "sn_fast, tol=": Method(_sn_fast(tol=_TOL), f"the same, iterated to the tolerance {_TOL:g}", True),
    "sn_fast, projection": Method(_projection(), "SpectralProjection.step() after the optimizer's", True),
    "sn_fast, projection, tol=": Method(_projection(tol=_TOL), f"the same, iterated to the tolerance {_TOL:g}", True),
    "torch": Method(_torch, "parametrizations.spectral_norm: one iteration of the reshaped kernel per forward", False),
    "published loop": Method(_published, "Farnia et al. 2019 in plain PyTorch, one iteration per forward", True),
    "deel-torchlip": Method(
        _torchlip,
        "SpectralConv2d, SpectralLinear (eps_bjorck=None): reshaped kernel times a bound",
        False,
        "deel-torchlip",
    ),
    "orthogonium": Method(_orthogonium, "-", None, "orthogonium"),
    "normflows": Method(
        _normflows, f"InducedNormConv2d, InducedNormLinear, tolerance {_TOL:g}, once per step", True, "normflows"
    ),
}
