"""The certificates of wide layers fit into memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import resource, torch
import sn_fast
torch.set_num_threads(1)
conv = torch.nn.Conv2d(2048, 2048, 3, bias=False)
op = sn_fast.operator_of(conv, (7, 7))
# What torch needs to start its linear algebra is no part of it.
sn_fast.operator_norm_bound(sn_fast.ConvOperator(torch.randn(4, 4, 3, 3), (7, 7)), method="fft")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
value = sn_fast.operator_norm_bound(op, method="fft", grid=4)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(float(value), (after - before) / 2**20)
"""


@pytest.mark.slow
def test_fft_of_2048_channels_stays_below_two_gibibytes() -> None:
    out = subprocess.run(
        [sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True, timeout=3600
    ).stdout
    value, gibibytes = map(float, out.split())
    assert value > 0
    assert gibibytes < 2
