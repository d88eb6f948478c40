"""The attacks as objects that keep their options."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Generic, Literal, overload

from torch import Tensor
from typing_extensions import TypeVar, Unpack

from .gradient import Model
from .methods import AttackInfo, fgm, pgd, wrm
from .options import FGMOptions, PGDOptions, WRMOptions

Result = TypeVar("Result", bound=Tensor | tuple[Tensor, AttackInfo], default=Tensor)
"""What a call returns: x_adv, or with ``return_info`` (x_adv, AttackInfo)."""


class _Attack(Generic[Result]):
    """A model and the options of an attack. ``attack(x, y)`` and ``attack.perturb(x, y)`` give x_adv."""

    method: ClassVar[Callable[..., Any]]

    def __init__(self, model: Model, **options: Any) -> None:
        inspect.signature(self.method).bind(model, None, None, **options)  # a misspelt option fails here, not later
        self.model = model
        self.options = options

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Result:
        attacked: Result = self.method(self.model, x, y, **self.options)
        return attacked

    perturb = __call__

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"{type(self).__name__}({type(self.model).__name__}, {options})"


class FGM(_Attack[Result]):
    """``fgm`` with its options, for loops that take an attack object. Options: the keywords of ``fgm``."""

    method = staticmethod(fgm)

    @overload
    def __init__(
        self: FGM[Tensor], model: Model, *, return_info: Literal[False] = False, **options: Unpack[FGMOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: FGM[tuple[Tensor, AttackInfo]],
        model: Model,
        *,
        return_info: Literal[True],
        **options: Unpack[FGMOptions],
    ) -> None: ...
    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **options)


class PGD(_Attack[Result]):
    """``pgd`` with its options, for loops that take an attack object. Options: the keywords of ``pgd``."""

    method = staticmethod(pgd)

    @overload
    def __init__(
        self: PGD[Tensor], model: Model, *, return_info: Literal[False] = False, **options: Unpack[PGDOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: PGD[tuple[Tensor, AttackInfo]],
        model: Model,
        *,
        return_info: Literal[True],
        **options: Unpack[PGDOptions],
    ) -> None: ...
    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **options)


class WRM(_Attack[Result]):
    """``wrm`` with its options, for loops that take an attack object. Options: the keywords of ``wrm``."""

    method = staticmethod(wrm)

    @overload
    def __init__(
        self: WRM[Tensor], model: Model, *, return_info: Literal[False] = False, **options: Unpack[WRMOptions]
    ) -> None: ...
    @overload
    def __init__(
        self: WRM[tuple[Tensor, AttackInfo]],
        model: Model,
        *,
        return_info: Literal[True],
        **options: Unpack[WRMOptions],
    ) -> None: ...
    def __init__(self, model: Model, **options: Any) -> None:
        super().__init__(model, **options)
