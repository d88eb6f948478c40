"""An inspection as text, and as one JSON document."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR
from typing import Any

from ..layers.describe import aligned, rounded, times
from .layers import Inspection, LayerMeasurement

_HEAD = ("layer", "type", "input", "norm at least", "at most", "width", "certificate", "reshaped", "off by", "")
_RIGHT = frozenset({3, 4, 5, 7, 8})
_LARGE = 1e6
_SHOWN = 3


def table(inspection: Inspection) -> str:
    """A line per layer, and what they amount to. Intervals are rounded outwards, so that they hold as printed."""
    lines = aligned([_HEAD, *map(_cells, inspection.layers)], _RIGHT)
    return "\n".join([*lines, "", *_summary(inspection)])


def document(inspection: Inspection) -> dict[str, Any]:
    """Everything, for json.dumps: numbers as they are, null for those that are not known or not finite."""
    largest = inspection.largest()
    return {
        "layers": [_entry(layer) for layer in inspection.layers],
        "unmeasured": list(inspection.unmeasured),
        "log10_product_of_upper_bounds": _finite(inspection.log10_product()),
        "largest": largest.name if largest else None,
        "seconds": inspection.seconds,
    }


def _cells(layer: LayerMeasurement) -> tuple[str, ...]:
    notes = [layer.note, *([f"same weight as {', '.join(layer.tied)}"] if layer.tied else [])]
    return (
        layer.name or "(the model)",
        f"{layer.kind} {layer.window}",
        times(layer.input_size) if layer.input_size else "-",
        _rounded(layer.lower, ROUND_FLOOR),
        _rounded(layer.upper, ROUND_CEILING),
        _percent(layer.width, "{:.2f}%"),
        layer.certificate.method if layer.certificate else "-",
        "-" if layer.reshaped is None else f"{layer.reshaped:.5g}",
        _percent(layer.reshaped_error, "{:+.1f}%"),
        "; ".join(filter(None, notes)),
    )


def _summary(inspection: Inspection) -> list[str]:
    measured = inspection.measured()
    largest = inspection.largest()
    layers = len({layer.name for layer in measured})
    count = f"{layers} layer{'s' * (layers != 1)} measured"
    if len(measured) != layers:
        count += f", at {len(measured)} input sizes in all"
    log10 = inspection.log10_product()
    product = f"10^{log10:.2f}" if abs(log10) > math.log10(_LARGE) and math.isfinite(log10) else f"{10**log10:.5g}"
    lines = [count]
    if largest:
        lines += [
            f"product of the upper bounds {product}",
            f"largest norm at most {_rounded(largest.upper, ROUND_CEILING)}: {largest.name}",
        ]
    if inspection.unmeasured:
        shown = ", ".join(inspection.unmeasured[:_SHOWN]) + (", ..." if len(inspection.unmeasured) > _SHOWN else "")
        others = len(inspection.unmeasured)
        lines.append(f"{others} other weight{'s' * (others != 1)} not measured: {shown}")
    return [*lines, f"{inspection.seconds:.1f} s"]


def _entry(layer: LayerMeasurement) -> dict[str, Any]:
    certificate = layer.certificate
    return {
        "name": layer.name,
        "type": layer.kind,
        "window": layer.window,
        "input_size": list(layer.input_size) if layer.input_size else None,
        "lower": layer.lower,
        "upper": layer.upper,
        "width": _finite(layer.width),
        "certificate": certificate.method if certificate else None,
        "every_input_size": certificate.every_size if certificate else None,
        "confidence": certificate.confidence if certificate else None,
        "detail": certificate.detail if certificate else None,
        "reshaped": layer.reshaped,
        "reshaped_error": _finite(layer.reshaped_error),
        "note": layer.note or None,
        "tied": list(layer.tied),
        "seconds": layer.seconds,
    }


def _rounded(value: float | None, direction: str) -> str:
    return "-" if value is None else rounded(value, direction)


def _percent(share: float | None, form: str) -> str:
    return "-" if share is None else form.format(100 * share)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
