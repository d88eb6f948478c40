"""Attacks on a model's input: FGM, PGD, WRM, and their single steps.

>>> x_adv = pgd(model, x, y, norm="Linf", eps=8 / 255, alpha=2 / 255, steps=10, clip=(0, 1))
>>> attack = PGD(model, norm=2, eps=0.5, clip=(0, 1)); x_adv = attack(x, y)
"""

from .methods import AttackInfo, fgm, pgd, wrm
from .objects import FGM, PGD, WRM
from .steps import pgd_step, project, random_start, wrm_step

__all__ = [
    "FGM",
    "PGD",
    "WRM",
    "AttackInfo",
    "fgm",
    "pgd",
    "pgd_step",
    "project",
    "random_start",
    "wrm",
    "wrm_step",
]
