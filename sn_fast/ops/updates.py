"""Operators of the attacks' updates. Arguments are as in ``reference.updates``; ``attacks.steps`` checks them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import updates as _reference
from .library import define


def _like_x_adv(x_adv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_adv)


pgd_step = define(
    "pgd_step(Tensor x_adv, Tensor x, Tensor grad, str norm, float eps, float alpha, Tensor? eps_per_sample,"
    " Tensor? alpha_per_sample, Tensor? lower, Tensor? upper, bool targeted, Tensor? active) -> Tensor",
    _reference.pgd_step,
    _like_x_adv,
)

wrm_step = define(
    "wrm_step(Tensor x_adv, Tensor x, Tensor grad, float eps, Tensor? eps_per_sample, float step, Tensor? lower,"
    " Tensor? upper) -> Tensor",
    _reference.wrm_step,
    _like_x_adv,
)

project = define(
    "project(Tensor x_adv, Tensor x, str norm, float eps, Tensor? eps_per_sample, Tensor? lower, Tensor? upper)"
    " -> Tensor",
    _reference.project,
    _like_x_adv,
)
