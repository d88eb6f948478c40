"""Weights of the published TensorFlow code in the networks of ``build_network``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import update_spectral_norm

_BATCH_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
_LISTED = 4  # names in a message


@dataclass(frozen=True)
class _Place:
    """Where a published variable belongs: a tensor of the network, and the order of the variable's axes in it."""

    target: Tensor
    axes: tuple[int, ...]  # of the variable, in the tensor's order
    is_vector: bool = False  # a singular vector, with a leading axis of length 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the published variable."""
        shape = [0] * len(self.axes)
        for size, axis in zip(self.target.shape, self.axes):
            shape[axis] = size
        return (1, *shape) if self.is_vector else tuple(shape)

    def fill(self, array: np.ndarray) -> None:
        values = torch.from_numpy(np.array(array[0] if self.is_vector else array))  # a copy: arrays may be read-only
        self.target.copy_(values.permute(self.axes))


def load_published(network: nn.Module, variables: Mapping[str, Any]) -> None:
    """Load variables of the published code: kernels (H, W, in, out), matrices (in, out), and the vectors of SN layers.

    As in every run of the published code, one power iteration follows from each loaded vector "u": from then on sigma
    and the logits are those of the published network, in evaluation and in the first training step.

    Args:
        network: from ``build_network``, for the image size of the variables.
        variables: {published name: array}, e.g. "conv1/weights", "conv1/bias", "conv1/weights_SN/u",
            "conv1/batch_normalization/gamma"; "conv1.weights" and "conv1/weights:0" are the same. All that the network
            has, and no others.

    Raises:
        ValueError: a variable is missing, is none of the network's, or has another shape; nothing is loaded.
        TypeError: an array is not one of real numbers.
    """
    places = published_places(network)
    arrays = {_canonical(name): _array(name, value) for name, value in variables.items()}
    _check_names(network, places, arrays)
    for name, place in places.items():
        if arrays[name].shape != place.shape:
            raise ValueError(f"variable {name!r} has shape {arrays[name].shape}; the network takes {place.shape}")
    with torch.no_grad():
        for name, place in places.items():
            if not place.is_vector:
                place.fill(arrays[name])
        vectors = {name: place for name, place in places.items() if place.is_vector}
        if vectors:
            update_spectral_norm(network)  # for the new weights first: a vector of theirs is no change of weight
            places = published_places(network)
            for name in vectors:
                places[name].fill(arrays[name])
            update_spectral_norm(network, 1)


def published_names(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names of the published variables that ``load_published`` takes for a network, and their shapes."""
    return {name: place.shape for name, place in published_places(network).items()}


def published_places(network: nn.Module) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for path, module in network.named_modules():
        scope = path.replace(".", "/")
        if isinstance(module, nn.BatchNorm2d):
            # That of a convolution lies in its scope.
            scope = scope.removesuffix("_bn") + "/batch_normalization" if scope.endswith("_bn") else scope
            places.update({f"{scope}/{n}": _Place(getattr(module, ours), (0,)) for n, ours in _BATCH_NORM.items()})
        elif isinstance(module, nn.Conv2d | nn.Linear):
            axes = (3, 2, 0, 1) if isinstance(module, nn.Conv2d) else (1, 0)
            if parametrize.is_parametrized(module, "weight"):
                chain: Any = module.parametrizations["weight"]  # type: ignore[index]
                weight, state = chain.original, chain[0]
                # The published u of a convolution is the image that the iteration starts from, else a row.
                is_image = state.v.ndim == 3
                vector = _Place(state.v, (2, 0, 1), True) if is_image else _Place(state.u, (0,), True)
                places[f"{scope}/weights_SN/u"] = vector
            else:
                weight = module.weight
            places[f"{scope}/weights"] = _Place(weight, axes)
            if module.bias is not None:
                places[f"{scope}/bias"] = _Place(module.bias, (0,))
    return places


def _canonical(name: str) -> str:
    return name.removesuffix(":0").replace(".", "/")


def _array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"variable {name!r} is no array of real numbers, but {array.dtype}")
    return array


def _check_names(network: nn.Module, places: Mapping[str, _Place], arrays: Mapping[str, np.ndarray]) -> None:
    missing = [name for name in places if name not in arrays]
    extra = [name for name in arrays if name not in places]
    if not (missing or extra):
        return
    parts = [
        f"{what} {_listed(names)}" for what, names in (("missing:", missing), ("not in the network:", extra)) if names
    ]
    vectors = all(name.endswith("/weights_SN/u") for name in missing + extra)
    hint = ""
    if vectors:
        hint = "; build the network with a finite beta" if extra else "; build the network with beta=inf"
    raise ValueError(f"load_published: {'; '.join(parts)}{hint}")


def _listed(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
