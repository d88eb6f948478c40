"""The state that one forward uses, and how a weight is told from the one that it was made for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..ops.library import stream_of
from .context import is_wrapped


class Snapshot(NamedTuple):
    """The state that one forward uses: tensors that nothing writes to any more.

    ``u``, ``v``, ``group`` and ``previous`` are None in a forward without gradients. ``ready`` holds the normalised
    weight, once, where kernels computed those of a whole model in one launch.
    """

    sigma: Tensor
    estimate: Tensor | None
    u: Tensor | None
    v: Tensor | None
    group: Tensor | None
    previous: Tensor | None
    moment: tuple[int, ...]  # which weight in which version, and the stream on which the tensors are made
    ready: list[Tensor]

    def to(self, device: torch.device) -> Snapshot:
        """The same on another device."""
        return Snapshot(*(x.to(device) if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]


class Kept(NamedTuple):
    """Copies of the state, and the buffers in the versions that they are of."""

    snapshot: Snapshot
    buffers: list[Tensor | None]
    versions: tuple[list[int | None], tuple[int, ...]]


def is_current(snapshot: Snapshot, weight: Tensor) -> bool:
    """Whether a weight is, as far as its version and place tell, still the snapshot's, and in use on its stream."""
    return torch.compiler.is_compiling() or snapshot.moment == moment(weight)


def moment(weight: Tensor) -> tuple[int, ...]:
    """Which tensor in which version, where it lies, and the current stream: on another one nothing waits for this."""
    if torch.compiler.is_compiling():
        return ()
    plain = type(weight) in (nn.Parameter, Tensor) and not is_wrapped(weight)
    place = weight.data_ptr() if plain else 0  # another one after .data = ..., which counts as no write
    return (version_of(weight), id(weight), place, *stream_of(weight.device))


def version_of(weight: Tensor) -> int:
    """The count of a tensor's writes, where it has one."""
    return 0 if torch.compiler.is_compiling() or weight.is_inference() else weight._version


def identity_of(weight: Tensor) -> tuple[object, ...]:
    """Which tensor in which version and layout."""
    return version_of(weight), id(weight), weight.data_ptr(), weight.stride()
