"""The keywords of the attacks as types, so that a checker or an editor refuses a misspelt one.

``fgm``, ``pgd`` and ``wrm`` document them. ``return_info`` is not among them: it decides what an attack returns.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
from torch import Tensor

from .arguments import Bound, Clip, Norm
from .task import Loss, Predict

LossName = Literal["ce", "bce"]
ModelMode = Literal["eval", "train", "keep"]


class AttackOptions(TypedDict, total=False):
    """What all attacks take."""

    loss: LossName | Loss
    predict: Predict | None
    clip: Clip
    targeted: bool
    mean: Bound | None
    std: Bound | None
    model_mode: ModelMode
    freeze_sn: bool
    autocast_dtype: torch.dtype | None


class _Radius(TypedDict):
    eps: float | Tensor


class FGMOptions(_Radius, AttackOptions, total=False):
    """The keywords of ``fgm``."""

    norm: Norm


class PGDOptions(_Radius, AttackOptions, total=False):
    """The keywords of ``pgd``."""

    norm: Norm
    steps: int
    alpha: float | Tensor | None
    random_start: bool
    restarts: int
    early_stop: bool
    keep_best: bool
    x_init: Tensor | None
    cuda_graph: bool
    generator: torch.Generator | None


class WRMOptions(AttackOptions, total=False):
    """The keywords of ``wrm``; one of gamma and eps is needed."""

    gamma: float | Tensor | None
    eps: float | Tensor | None
    steps: int
