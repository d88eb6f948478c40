"""The result of ``lipschitz_bound``: a table, JSON, a plot, and certified radii."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError, require
from ..files import replace_file
from ..layers.describe import aligned, html_table
from .labels import check_logits, class_indices, two_sided

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEAD = ("layer", "type", "constant", "bound so far", "how")
_NUMBERS = (2, 3)  # columns
_BAR_COLOUR, _NO_BOUND_COLOUR = "#0072B2", "#D55E00"  # Okabe and Ito's
_DPI = 150


@dataclass(frozen=True)
class LayerBound:
    """One layer or operation.

    Attributes:
        name: path of the module, or of the module whose forward has the call and the name of the call.
        kind: class of the module, or name of the function.
        constant: its own l2 Lipschitz constant, from above; None where several bounds combine (sums, concatenations).
        bound: of the map from the network's input to its output; infinite if unknown.
        how: "closed form", the method of the certificate ("dense", "fft", ...), or "none".
        reason: why the constant is infinite, else empty.
    """

    name: str
    kind: str
    constant: float | None
    bound: float
    how: str
    reason: str = ""


@dataclass(frozen=True)
class LipschitzReport:
    """A certified bound of a network's l2 Lipschitz constant, and where it comes from.

    Attributes:
        bound: of the map from input to output; infinite if there is none.
        layers: in the order of execution; folded layers are one row.
        reason: why the bound is infinite, else empty.
    """

    bound: float
    layers: tuple[LayerBound, ...]
    reason: str = ""

    def certified_radius(self, logits: Tensor, y: Any = None) -> Tensor:
        """l2 distance within which no input changes the prediction: margin / (sqrt(2) L), or |z| / L for one logit z.

        Each difference of two logits is sqrt(2) L-Lipschitz (Tsuzuku, Sato, Sugiyama 2018, Lipschitz-margin training);
        a single logit is L-Lipschitz itself.

        Args:
            logits: (B, classes), outputs of the network; of a binary classifier with one logit (B, 1) or (B,), whose
                prediction is 1 where it is positive and 0 where it is negative.
            y: B true classes, as a tensor, array or list of integers; None: the network's own prediction.

        Returns:
            (B,) in float64, in the units of the input; 0 where the prediction is not ``y``, where a logit is infinite
            or NaN, and where the bound is infinite.

        Raises:
            TypeError: ``logits`` is not a floating-point tensor.
            ValueError: ``logits`` or ``y`` has another shape, or a class in ``y`` does not exist.
        """
        check_logits(logits)
        scores, binary = two_sided(logits.detach().double())
        chosen = (
            scores.nan_to_num().argmax(dim=1) if y is None else class_indices(y, scores.shape, binary, scores.device)
        )
        own = scores.gather(1, chosen[:, None])[:, 0]
        others = scores.scatter(1, chosen[:, None], -math.inf).amax(dim=1)
        half_margin = own / 2 - others / 2  # the whole one may overflow
        slope = self.bound / (2 if binary else math.sqrt(2))
        # The quotient of two rounded numbers: an ulp or two, the other way.
        radius = half_margin / slope * (1 - 1e-12) if self.bound else half_margin * math.inf
        radius = radius.clamp(max=torch.finfo(torch.float64).max) if self.bound else radius
        return torch.where((half_margin > 0) & scores.isfinite().all(dim=1), radius, 0.0)

    def __str__(self) -> str:
        return "\n".join([*aligned(self._rows(), _NUMBERS), self._conclusion()])

    def _repr_html_(self) -> str:
        """As notebooks show it."""
        return html_table(self._rows(), _NUMBERS, self._conclusion())

    def _rows(self) -> list[tuple[str, ...]]:
        return [_HEAD, *map(_cells, self.layers)]

    def _conclusion(self) -> str:
        return f"Lipschitz bound: {_number(self.bound)}" + (f" ({self.reason})" if self.reason else "")

    def to_dict(self) -> dict[str, Any]:
        """bound, reason and layers; numbers as they are."""
        return {"bound": self.bound, "reason": self.reason, "layers": [asdict(layer) for layer in self.layers]}

    def to_json(self) -> str:
        """``to_dict`` as JSON. Infinity is the string "inf", which ``float`` reads; no constant is null."""
        document = self.to_dict()
        for entry in (document, *document["layers"]):
            entry.update({k: "inf" for k, v in entry.items() if isinstance(v, float) and math.isinf(v)})
        return json.dumps(document, indent=1, allow_nan=False)

    def plot(self, target: str | os.PathLike[str] | Axes) -> None:
        """Bars of the layers' constants: written to an image file (png, pdf, svg), or drawn into axes of matplotlib.

        Raises:
            ImportError: matplotlib is not installed. ValueError: no layer has a constant.
        """
        layers = [layer for layer in self.layers if layer.constant is not None]
        if not layers:
            raise ValueError("the report has no layer with a constant: nothing to plot")
        width = 4.5 + 0.07 * max(map(len, map(_label, layers)))  # room for the names beside the bars
        figure = _matplotlib("figure").Figure(figsize=(width, 1.2 + 0.24 * len(layers)), layout="constrained")
        if not isinstance(target, (str, os.PathLike)):
            self._draw(target, layers)
            return
        self._draw(figure.subplots(), layers)
        path = Path(target)
        image = io.BytesIO()
        figure.savefig(image, dpi=_DPI, format=path.suffix.lstrip(".").lower() or "png")
        replace_file(path, image.getvalue())

    def _draw(self, axes: Axes, layers: list[LayerBound]) -> None:
        constants = [layer.constant or 0.0 for layer in layers]
        finite = [c for c in constants if 0 < c < math.inf] or [1.0]
        left, right = min(1.0, *finite) / 2, max(1.0, *finite) * 2
        for i, c in enumerate(constants):
            if math.isinf(c):
                axes.barh(i, right / left, left=left, height=0.7, fill=False, hatch="//", edgecolor=_NO_BOUND_COLOUR)
                background = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                axes.text(left * 1.05, i, "no finite bound", va="center", fontsize="small", bbox=background)
            else:
                axes.barh(i, max(c - left, 0.0), left=left, height=0.7, color=_BAR_COLOUR)
        axes.axvline(1.0, color="black", linestyle="--", linewidth=1)
        axes.set_yticks(range(len(layers)), list(map(_label, layers)), fontsize="small")
        axes.set(
            xscale="log",
            xlim=(left, right),
            ylim=(len(layers) - 0.5, -0.5),
            xlabel="ℓ2 Lipschitz constant of the layer, at most",
            title=f"network: at most {_number(self.bound)}",
        )
        ticker = _matplotlib("ticker")
        axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if right < 1000 * left else (1,), numticks=8))
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def _label(layer: LayerBound) -> str:
    return f"{layer.name} ({layer.kind})"


def _cells(layer: LayerBound) -> tuple[str, ...]:
    constant = "-" if layer.constant is None else _number(layer.constant)
    return layer.name, layer.kind, constant, _number(layer.bound), layer.reason or layer.how


def _number(x: float) -> str:
    return f"{x:.6g}"


def _matplotlib(module: str) -> Any:
    try:
        return require(f"matplotlib.{module}")
    except UserError as error:
        raise ImportError(str(error)) from error
