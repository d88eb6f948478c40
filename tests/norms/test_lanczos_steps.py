"""The number of Lanczos steps, and when the result counts as exact."""

from __future__ import annotations

import math

import pytest
import torch

from sn_fast import MatrixOperator
from sn_fast.norms.lanczos_bound import lanczos_bound


def test_one_step_short_of_all_is_not_taken_for_exact() -> None:
    n, delta = 30, 1e-6
    log = math.log(1.648 * math.sqrt(n) / delta)
    op = MatrixOperator(torch.eye(n, dtype=torch.float64))
    for tightness in (1 + i / 1000 for i in range(1, 2000)):
        bound, steps = lanczos_bound(op, tightness, delta, torch.Generator().manual_seed(0))
        if steps == n - 1:
            assert bound >= 1 / math.sqrt(1 - (log / (2 * steps - 1)) ** 2)
            return
    pytest.fail("no tightness asks for n - 1 steps")
