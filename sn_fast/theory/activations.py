"""How fast the slope of an activation changes: sup |s''|, which the theorems on attacks bound by 1."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from ..lipschitz.rounding import loosened
from ..lipschitz.rules import Call, ruled_class

_NO_ACTIVATIONS = {"softmax", "softmin", "softmax2d", "specialsoftmax", "logsoftmax", "speciallogsoftmax"}


def _elu(call: Call) -> float:
    # the slope alpha exp(x) for x < 0 meets 1 at zero only for alpha = 1
    return 1.0 if call.get("alpha", 1.0) == 1 else math.inf


def _celu(call: Call) -> float:
    # slope exp(x / alpha) for x < 0, and 1 above
    return 1 / call.get("alpha", 1.0)


def _softplus(call: Call) -> float:
    # slope s(beta x), of slope beta s (1 - s)
    return call.get("beta", 1.0) / 4


def _is(value: float) -> Callable[[Call], float]:
    return lambda call: value


# sup |s''|; what is not here has a slope that jumps, or none that is known.
_CURVATURES: dict[str, Callable[[Call], float]] = {
    "elu": _elu,
    "celu": _celu,
    "softplus": _softplus,
    "tanh": _is(loosened(4 / (3 * math.sqrt(3)))),  # at tanh(x) = 1 / sqrt(3)
    "tanhshrink": _is(loosened(4 / (3 * math.sqrt(3)))),
    "sigmoid": _is(loosened(1 / (6 * math.sqrt(3)))),  # at s = 1/2 +- 1 / (2 sqrt(3))
    "specialexpit": _is(loosened(1 / (6 * math.sqrt(3)))),
    "logsigmoid": _is(0.25),
    "softsign": _is(2.0),  # 2 / (1 + |x|)^3
    "sin": _is(1.0),
    "cos": _is(1.0),
    "atan": _is(loosened(3 * math.sqrt(3) / 8)),  # 2 x / (1 + x^2)^2 at x = 1 / sqrt(3)
    "arctan": _is(loosened(3 * math.sqrt(3) / 8)),
    "asinh": _is(loosened(2 / (3 * math.sqrt(3)))),  # x / (1 + x^2)^(3/2) at x = 1 / sqrt(2)
    "arcsinh": _is(loosened(2 / (3 * math.sqrt(3)))),
}


def curvature(call: Call) -> float:
    """sup |s''| of an activation that acts on each element alone; infinite where its slope jumps."""
    entry = _CURVATURES.get(_name(call))
    return math.inf if entry is None else float(entry(call))


def is_identity(call: Call) -> bool:
    """Whether an activation's rule is one of what does nothing in eval mode: dropout, stochastic depth."""
    name = _name(call)
    return "dropout" in name or "stochasticdepth" in name


def is_elementwise(call: Call) -> bool:
    return _name(call) not in _NO_ACTIVATIONS


def _name(call: Call) -> str:
    """The class or function as one word: "logsigmoid" for F.logsigmoid and nn.LogSigmoid."""
    known: type[nn.Module] | None = None if call.module is None else ruled_class(call.module)
    name = call.kind if known is None else known.__name__
    return name.lower().replace("_", "").replace("torchvision.", "")
