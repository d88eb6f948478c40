"""Small layers of every kind, alone or in a model, and the norm of what they compute: for the tests of the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.normalization.parametrization import SpectralNorm


class Kind(NamedTuple):
    """How a layer is made, and the shape of one input."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def batch(self, n: int = 3, seed: int = 7) -> Tensor:
        return torch.randn(n, *self.shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "linear": Kind(lambda: nn.Linear(6, 5), (6,)),
    "conv": Kind(lambda: nn.Conv2d(2, 4, 3, padding=1), (2, 5, 5)),
    "grouped": Kind(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 5, 5)),
    "transposed": Kind(lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1), (3, 4, 4)),
}
HOWS = ("layer", "model")


def made(kind: str, how: str, seed: int = 0, **options) -> nn.Module:
    """A normalised layer: by ``spectral_norm``, or as a model by ``apply_spectral_norm``; mode="scale" by default."""
    torch.manual_seed(seed)
    layer, options = KINDS[kind].make(), {"mode": "scale", **options}
    if how == "model":
        return sn_fast.apply_spectral_norm(nn.Sequential(layer), KINDS[kind].batch(1), **options)
    return sn_fast.spectral_norm(layer, input_size=KINDS[kind].shape[1:] or None, **options)


def layer_of(model: nn.Module) -> nn.Module:
    return model[0] if isinstance(model, nn.Sequential) else model


def raw_of(model: nn.Module) -> nn.Parameter:
    return layer_of(model).parametrizations.weight.original


def norm_of(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> float:
    """The spectral norm of an affine function, from its dense matrix: sn_fast computes nothing of it."""
    n = torch.Size(shape).numel()
    with torch.no_grad():
        inputs = torch.cat([torch.eye(n), torch.zeros(1, n)]).to(dtype).reshape(-1, *shape)
        outputs = function(inputs).flatten(1).double()
    return float(torch.linalg.matrix_norm(outputs[:-1] - outputs[-1], 2))


def norm_in_use(model: nn.Module, kind: str) -> float:
    """The norm of a normalised layer as the next forward applies it."""
    return norm_of(model, KINDS[kind].shape, raw_of(model).dtype)


def raw_norm(weight: Tensor, kind: str) -> float:
    """The norm of a layer of this kind with this weight."""
    layer = KINDS[kind].make()
    layer.weight = nn.Parameter(weight.detach().clone())
    return norm_of(layer.to(weight.dtype), KINDS[kind].shape, weight.dtype)


def members(model: nn.Module) -> list[SpectralNorm]:
    return [m for m in model.modules() if isinstance(m, SpectralNorm)]


def full_state(model: nn.Module) -> list[Tensor]:
    """Buffers and records, copied."""
    tensors = [t for m in members(model) for t in (*m.buffers(), m.record)]
    return [t.clone() for t in tensors if t is not None]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(_bits(x), _bits(y)) for x, y in zip(a, b))


def _bits(t: Tensor) -> Tensor:
    """NaN equals itself."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.detach().contiguous().view(words[t.element_size()]) if t.is_floating_point() else t.detach()
