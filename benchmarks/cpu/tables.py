"""All tables by name: what their rows are, and what of their meaning belongs to the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from . import attacks, certificates, curves, footprint, training
from .methods import METHODS

Rows = dict[str, Callable[[], Mapping[str, Any]]]


@dataclass(frozen=True)
class Table:
    """``rows``: what measures each row, given whether to be quick; ``facts``: what is true of the whole table."""

    rows: Callable[[bool], Rows]
    facts: Callable[[], Mapping[str, Any]] = dict


def _methods() -> dict[str, Any]:
    return {"methods": {n: {"computes": m.computes, "true_norm": m.true_norm} for n, m in METHODS.items()}}


TABLES: dict[str, Table] = {
    "refresh": Table(training.refresh_rows, _methods),
    "steps": Table(training.step_rows, _methods),
    "updates": Table(attacks.update_rows),
    "attacks": Table(attacks.attack_rows),
    "certificates": Table(certificates.certificate_rows),
    "networks": Table(certificates.network_rows),
    "curves": Table(curves.rows),
    "footprint": Table(footprint.rows),
}
