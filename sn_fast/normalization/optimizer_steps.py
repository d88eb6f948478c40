"""Whether an optimizer has taken a step: then a weight in a new version is a trained one, not another one."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class _Steps:
    latest: object = object()
    hook: RemovableHandle | None = None  # None: nobody has asked, as where the host compares weights itself


def latest() -> object:
    """A mark that is another one after each step of any optimizer of torch.optim, from the first call on."""
    if _Steps.hook is None:
        _Steps.hook = register_optimizer_step_post_hook(_note)
    return _Steps.latest


def _note(*_: Any) -> None:
    if not torch.compiler.is_compiling():  # unseen there, a step only costs a look at the weights
        _Steps.latest = object()
