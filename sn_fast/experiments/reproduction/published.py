"""What the paper's published notebooks report: adversarial accuracies, one row per data set, network and scheme.

Farnia, Zhang, Tse, "Generalizable Adversarial Training via Spectral Normalization" (ICLR 2019); the stored outputs of
the code's notebooks. An accuracy is that under the attack trained with, at the strength trained with, and with the
network's own predictions as the attack's labels; of ERM that on clean images. beta was chosen by the validation
accuracy (the first 500 test images) among several, of which inf is one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..training import TrainConfig
from ..training.defaults import defaults_of


@dataclass(frozen=True)
class PublishedRow:
    """One row: accuracies (train, validation, test) in [0, 1] without normalisation and with the best beta."""

    data: str
    arch: str
    """Without "_sn"."""
    norm: str
    eps: float | None
    """Radius of the rows in l_inf; None: 0.05 E||x||_2, or of WRM that of its gamma."""
    scheme: str
    plain: tuple[float, float, float]
    beta: float
    capped: tuple[float, float, float]

    @property
    def gain(self) -> float:
        """What the cap adds to the test accuracy."""
        return self.capped[2] - self.plain[2]


@cache
def published_rows() -> tuple[PublishedRow, ...]:
    """All 62 rows."""
    rows = json.loads(Path(__file__).with_name("published.json").read_bytes())
    return tuple(
        PublishedRow(
            data=row["data"],
            arch=row["arch"],
            norm=row["norm"],
            eps=row["eps"],
            scheme=row["scheme"],
            plain=tuple(row["plain"]),
            beta=float(row["beta"]),
            capped=tuple(row["capped"]),
        )
        for row in rows
    )


def published_row(data: str, arch: str, scheme: str, norm: str = "2", eps: float | None = None) -> PublishedRow | None:
    """The row of one combination; ``arch`` with or without "_sn". None: nothing was published."""
    name = arch.removesuffix("_sn")
    wanted = (data, name, scheme, norm, eps)
    found = (r for r in published_rows() if (r.data, r.arch, r.scheme, r.norm, r.eps) == wanted)
    return next(found, None)


def published_row_of(config: TrainConfig) -> PublishedRow | None:
    """The row of what a run trains, whatever its beta; the radius of l2, relative to the images, does not matter."""
    if config.scheme in ("erm", "wrm") or config.norm == "2":
        return published_row(config.data, config.arch, config.scheme)
    radius = defaults_of(config.data).strength.radius[config.norm] if config.eps is None else config.eps
    return published_row(config.data, config.arch, config.scheme, config.norm, radius)
