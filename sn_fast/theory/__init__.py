"""What the paper's theorems are made of, as numbers: margins, capacities, statistics of gradients; and amplification.

>>> phi = capacity(model, "fgm", example_input=x[:1], eps=0.5, kappa=0.01)
>>> float(phi), phi.terms["L"], phi.notes
"""

from .amplification import Amplification, amplification
from .capacity import Capacity, capacity
from .complexity import Complexity, complexity
from .detector import AmplificationDetector
from .gradients import gradient_norms, norm_gain
from .margins import margin_scale, margins, normalized_margins
from .network import OutsideSetting
from .norms import LayerNorms

__all__ = [
    "Amplification",
    "AmplificationDetector",
    "Capacity",
    "Complexity",
    "LayerNorms",
    "OutsideSetting",
    "amplification",
    "capacity",
    "complexity",
    "gradient_norms",
    "margin_scale",
    "margins",
    "norm_gain",
    "normalized_margins",
]
