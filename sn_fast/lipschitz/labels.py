"""Logits and class labels, checked; those of a binary classifier with one logit too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_logits(logits: Any) -> None:
    """Raise unless ``logits`` is a floating-point tensor (B, classes), or (B,) of one logit each."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits is a {type(logits).__name__}; give a floating-point tensor")
    if logits.ndim not in (1, 2) or logits.shape[1:] == (0,):
        raise ValueError(f"logits has shape {tuple(logits.shape)}; give (B, classes), or (B,) of one logit each")
    if not logits.is_floating_point():
        raise TypeError(f"logits has dtype {logits.dtype}; give a floating-point tensor")


def two_sided(logits: Tensor) -> tuple[Tensor, bool]:
    """Logits as (B, classes), and whether they were one each: z then stands against 0, (0, z)."""
    binary = logits.ndim == 1 or logits.shape[1] == 1
    if binary:
        z = logits.reshape(-1)
        logits = torch.stack((torch.zeros_like(z), z), dim=1)
    return logits, binary


def class_indices(y: Any, shape: Sequence[int], binary: bool, device: torch.device) -> Tensor:
    """Class indices for scores of shape (B, classes), checked, as an int64 tensor (B,).

    Raises:
        ValueError: ``y`` is not a list of B integers, or a class in it does not exist.
    """
    rows, count = shape
    expected = f"give {rows} class indices, integers from 0 to {count - 1}"
    try:
        given = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"y={y!r} is not a list of integers; {expected}") from error
    if given.shape == (rows, 1) and binary:
        given = given[:, 0]
    if given.numel() == 0 and rows == 0:
        given = given.long()
    if given.shape != (rows,) or given.is_floating_point() or given.is_complex():
        raise ValueError(f"y has shape {tuple(given.shape)}, {given.dtype}; {expected}")
    given = given.to(device, torch.int64)
    wrong = given[(given < 0) | (given >= count)]
    if wrong.numel():
        raise ValueError(f"y has the class {int(wrong[0])}; {expected}")
    return given
