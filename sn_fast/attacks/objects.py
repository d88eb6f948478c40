"""The attacks as objects that keep their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from .gradient import Model
from .methods import Attacked, fgm, pgd, wrm


class _Attack:
    """A model and the options of an attack. ``attack(x, y)`` and ``attack.perturb(x, y)`` give x_adv."""

    method: ClassVar[Callable[..., Attacked]]

    def __init__(self, model: Model, **options: Any) -> None:
        inspect.signature(self.method).bind(model, None, None, **options)  # a misspelt option fails here, not later
        self.model = model
        self.options = options

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Attacked:
        return self.method(self.model, x, y, **self.options)

    perturb = __call__

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({type(self.model).__name__}, {options})"


class FGM(_Attack):
    """``fgm`` with its options, for loops that take an attack object. Options: the keywords of ``fgm``."""

    method = staticmethod(fgm)


class PGD(_Attack):
    """``pgd`` with its options, for loops that take an attack object. Options: the keywords of ``pgd``."""

    method = staticmethod(pgd)


class WRM(_Attack):
    """``wrm`` with its options, for loops that take an attack object. Options: the keywords of ``wrm``."""

    method = staticmethod(wrm)
