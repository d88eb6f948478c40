"""Adversarial training of a small network with and without spectral normalisation: the job behind ``sn-fast train``.

>>> result = train(TrainConfig.create(scheme="pgm", beta=2.0, seed=3))
>>> print(table(result.config, result.metrics))
"""

from ...errors import UserError
from .config import TrainConfig
from .errors import DivergedRun, Interrupted
from .job import RunResult, resume, train
from .report import table

__all__ = ["DivergedRun", "Interrupted", "RunResult", "TrainConfig", "UserError", "resume", "table", "train"]
