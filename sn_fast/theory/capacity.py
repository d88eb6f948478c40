"""The spectral capacity Phi of a network, under ERM and under the attacks of the paper."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layers.describe import aligned
from .logarithms import exp
from .network import OutsideSetting
from .norms import LayerNorms, NetworkNorms, network_norms
from .schemes import Scheme, log_factor

_ROUNDING = 1e-12  # of an exponential, and of a short sum of them
_HEAD = ("layer", "type", "spectral", "Frobenius", "ratio", "scale", "share of the total")


@dataclass(frozen=True)
class Capacity:
    """Phi and what it is made of. ``float(capacity)`` is the total.

    Attributes:
        scheme: "erm", "fgm", "pgm" or "wrm".
        total: Phi; infinite where it exceeds float64 (``log_total`` is then finite) or where ``reason`` says so.
        log_total: its natural logarithm.
        terms: every factor by its name (docs/theory.md lists them); those by layer are dicts.
        layers: the norms of each layer.
        notes: what of the network or the numbers the theorem does not cover.
        certified: whether norms are upper ends, and all that is made of them is rounded up.
        reason: why the total is infinite, else empty.
    """

    scheme: str
    total: float
    log_total: float
    terms: dict[str, Any]
    layers: tuple[LayerNorms, ...]
    notes: tuple[str, ...]
    certified: bool
    reason: str = ""

    def __float__(self) -> float:
        return self.total

    def to_dict(self) -> dict[str, Any]:
        """Scheme, total, log_total, terms, notes, certified and reason, as plain numbers and strings."""
        names = ("scheme", "total", "log_total", "terms", "notes", "certified", "reason")
        return {name: list(value) if name == "notes" else value for name in names for value in [getattr(self, name)]}

    def __str__(self) -> str:
        by_layer = self.terms["contributions"]
        rows = [_HEAD] + [
            (
                *(layer.name, layer.kind),
                *(f"{v:.6g}" for v in (layer.spectral, layer.frobenius, layer.ratio, layer.scale)),
                f"{by_layer[layer.name] / self.total:.1%}" if 0 < self.total < math.inf else "-",
            )
            for layer in self.layers
        ]
        factors = [f"{k} = {v:.6g}" for k, v in self.terms.items() if not isinstance(v, dict)]
        end = f"Phi ({self.scheme}) = {self.total:.6g}, log Phi = {self.log_total:.6g}"
        ends = [end + (f": {self.reason}" if self.reason else ""), *(f"note: {note}" for note in self.notes)]
        return "\n".join([*aligned(rows, frozenset(range(2, 7))), ", ".join(factors), *ends])


def capacity(
    model: nn.Module,
    scheme: str,
    *,
    example_input: Tensor,
    eps: float | None = None,
    kappa: float | None = None,
    alpha: float | None = None,
    steps: int | None = None,
    lam: float | None = None,
    certified: bool = False,
    assume_smooth: bool = False,
) -> Capacity:
    """Phi of the generalisation theorems: Neyshabur et al. 2018 ("erm"); Farnia, Zhang, Tse 2019 ("fgm", "pgm", "wrm").

    With sigma_i = ||W_i||_2 and L = prod_i sigma_i * sum_i prod_{j <= i} sigma_j, which bounds the Lipschitz constant
    of the loss gradient in x,

        Phi = (prod_i sigma_i * (1 + a))^2 * sum_i ||W_i||_F^2 / sigma_i^2,

    erm: a = 0.  fgm: a = (eps / kappa) L.  pgm: a = (alpha / kappa) L sum_{t < steps} (2 alpha L / kappa)^t.
    wrm: a = L / (lam - L). Norms are those of the layers' true linear maps at their input sizes, with the weights in
    use. The formulas are those of docs/theory.md, which says where they come from.

    Args:
        model: linear layers (with pooling, running normalisation, reshapes) in a row with 1-Lipschitz activations
            between them; followed once in eval mode, and left as it was. For attacks derivatives too must be
            1-Lipschitz, as those of ELU, softplus and tanh are.
        scheme: "erm", "fgm", "pgm" or "wrm".
        example_input: floating-point tensor (B, *size); batch size 1 is enough.
        eps: l2 radius of fgm and pgm, in the units of x.
        kappa: least l2 norm of the loss gradient in x, for fgm and pgm; see ``gradient_norms``.
        alpha, steps: step length and number of steps of pgm. None: 2 eps / steps, and 15.
        lam: multiplier of wrm, whose price of moving by d is lam/2 ||d||^2: twice the ``gamma`` of
            ``sn_fast.attacks.wrm``.
        certified: take upper ends of the norms, and round up; else the spectral norms are estimates from below, right
            to about 1e-5.
        assume_smooth: take ReLU and the like, and max pooling, as if their derivatives were 1-Lipschitz; a note says
            so.

    Raises:
        OutsideSetting (a ValueError): the theorem does not cover the network; the message names the layer.
        ValueError: an unknown scheme, a parameter that is missing, out of range or of another scheme; a weight that is
            not finite. TypeError: ``model`` or ``example_input`` is of another type.
    """
    given = {"eps": eps, "kappa": kappa, "alpha": alpha, "steps": steps, "lam": lam}
    chosen = Scheme.create(scheme, given)
    return capacity_of(network_norms(model, example_input, certified=certified), chosen, assume_smooth)


def capacity_of(norms: NetworkNorms, scheme: Scheme, assume_smooth: bool) -> Capacity:
    """The capacity of a network that has been measured."""
    notes = list(norms.notes)
    if scheme.name != "erm" and not norms.smooth:
        if not assume_smooth:
            raise OutsideSetting(
                f"{norms.rough} has no 1-Lipschitz derivative, which scheme={scheme.name!r} needs; use ELU, softplus "
                "or tanh, or assume_smooth=True to compute the expression all the same"
            )
        notes.append(f"assume_smooth=True: {norms.rough} has no 1-Lipschitz derivative, as the theorem needs")
    if not norms.certified:
        notes.append("spectral norms are estimates from below; certified=True takes upper ends")
    zero = [layer.name for layer in norms.layers if not layer.spectral]
    log_product, log_ratios, log_l = norms.log_product, norms.log_ratio_sum, norms.log_gradient_lipschitz
    log_attack = norms.up(log_factor(scheme, log_l))
    squared = 2 * (log_product + log_attack)
    log_total = -math.inf if zero else norms.up(squared + log_ratios)
    reason = "" if zero else scheme.why_infinite(log_l)
    total = _up(exp(log_total), norms.certified)
    if math.isinf(total) and not reason:
        reason = "it exceeds float64; log_total has it"

    def number(x: float) -> float:
        return _up(exp(x), norms.certified)

    contributions = {layer.name: 0.0 if zero else number(norms.up(squared + layer.log_ratio)) for layer in norms.layers}
    terms: dict[str, Any] = {
        "spectral_norms": {layer.name: layer.spectral for layer in norms.layers},
        "frobenius_norms": {layer.name: layer.frobenius for layer in norms.layers},
        "ratios": {layer.name: layer.ratio for layer in norms.layers},
        "scales": {layer.name: layer.scale for layer in norms.layers if layer.scale != 1},
        "contributions": contributions,
        "product": number(log_product),
        "log_product": log_product,
        "ratio_sum": number(log_ratios),
        "L": number(log_l),
        "log_L": log_l,
        "attack_factor": number(log_attack),
        "log_attack_factor": log_attack,
        "depth": float(len(norms.layers)),
        "width": float(norms.width),
        **scheme.terms(),
    }
    if zero:
        notes.append(f"the weight of {', '.join(zero)} is zero, and so is the network's map")
    return Capacity(scheme.name, total, log_total, terms, norms.layers, tuple(notes), norms.certified, reason)


def _up(x: float, certified: bool) -> float:
    return x * (1 + _ROUNDING) if certified else x
