"""The attacks of the paper at a fixed strength, as training and evaluation use them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...attacks import fgm, pgd, wrm
from .reference import published_fgm


@dataclass(frozen=True)
class Adversary:
    """An attack of the paper (section 2), or "erm", which attacks nothing.

    ``eps`` is a radius in ``norm`` for "fgm" and "pgm", and 1 / (2 gamma) for "wrm", where ``norm`` has no meaning.
    """

    scheme: str
    norm: Literal["2", "inf", "1"]
    eps: float
    steps: int
    autocast_dtype: torch.dtype | None = None
    reference: bool = False
    """FGM in the published arithmetic."""

    def perturb(self, model: nn.Module, x: Tensor, y: Tensor | None) -> Tensor:
        """x, (B, C, H, W), moved against labels y, (B,); None: against the model's own predictions."""
        if self.scheme == "erm":
            return x
        common: Any = {"eps": self.eps, "autocast_dtype": self.autocast_dtype}
        if self.scheme == "fgm" and self.reference:
            return published_fgm(model, x, y, norm=self.norm, eps=self.eps)
        if self.scheme == "fgm":
            return fgm(model, x, y, norm=self.norm, **common)
        if self.scheme == "pgm":
            return pgd(model, x, y, norm=self.norm, steps=self.steps, **common)
        return wrm(model, x, y, steps=self.steps, **common)

    def scaled(self, factor: float) -> Adversary:
        return replace(self, eps=factor * self.eps)

    def __str__(self) -> str:
        if self.scheme == "erm":
            return "clean"
        if self.scheme == "wrm":
            return f"WRM 1/(2γ) = {self.eps:.4g}"
        return f"{self.scheme.upper()} ℓ{self.norm.replace('inf', '∞')} ε = {self.eps:.4g}"
