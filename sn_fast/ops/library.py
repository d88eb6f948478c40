"""The ``sn_fast`` operator library: one place where a schema, its reference implementation and its fake meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("sn_fast", "DEF")


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define the operator ``sn_fast::<schema>`` and return its overload, ready to be called.

    ``reference`` (plain PyTorch) is registered as CompositeExplicitAutograd: the dispatcher uses it on every device
    that has no kernel of its own, so it is the fallback as well as the oracle. ``fake`` gives the output's shapes.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sn_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.sn_fast, name).default
