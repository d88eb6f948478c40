"""Adversarial training of a small network with and without spectral normalisation: the job behind ``sn-fast train``.

>>> result = train(TrainConfig.create(scheme="pgm", beta=2.0, seed=3))
>>> print(table(result.config, result.metrics))
"""

from ...errors import UserError
from .config import TrainConfig
from .errors import DivergedRun, Interrupted
from .job import RunResult, resume, train
from .report import table
from .trained import TrainedNetwork, trained_networks

__all__ = [
    "DivergedRun",
    "Interrupted",
    "RunResult",
    "TrainConfig",
    "TrainedNetwork",
    "UserError",
    "resume",
    "table",
    "train",
    "trained_networks",
]
