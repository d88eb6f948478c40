"""What was pickled by the first versions can be read: the paths of the classes in these bytes stay."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from torch import nn

import sn_fast
from sn_fast.attacks import PGD
from sn_fast.lipschitz import LayerBound, LipschitzReport

# pickle.dumps(..., protocol=0) by version 0.1.0
STORED = {
    b"ccopy_reg\n_reconstructor\np0\n(csn_fast.lipschitz.report\nLipschitzReport\np1\nc__builtin__\nobject\np2\nNtp3\n"
    b"Rp4\n(dp5\nVbound\np6\nF2.0\nsVlayers\np7\n(g0\n(csn_fast.lipschitz.report\nLayerBound\np8\ng2\nNtp9\nRp10\n(dp11"
    b"\nVname\np12\nV0\np13\nsVkind\np14\nVLinear\np15\nsVconstant\np16\nF2.0\nsg6\nF2.0\nsVhow\np17\nVdense\np18\n"
    b"sVreason\np19\nV\np20\nsbtp21\nsg19\ng20\nsb.": LipschitzReport(
        2.0, (LayerBound("0", "Linear", 2.0, 2.0, "dense"),)
    ),
    b"ccopy_reg\n_reconstructor\np0\n(csn_fast.norms.general_bound\nBoundInfo\np1\nc__builtin__\nobject\np2\nNtp3\nRp4\n"
    b"(dp5\nVmethod\np6\nVfft\np7\nsVevery_size\np8\nI01\nsVconfidence\np9\nF1.0\nsVdetail\np10\nVx\np11\nsVcertified\n"
    b"p12\nI01\nsb.": sn_fast.BoundInfo("fft", True, 1.0, "x"),
    b"ccopy_reg\n_reconstructor\np0\n(csn_fast.norms.clip\nClippedSpectrum\np1\nc__builtin__\nobject\np2\nNtp3\nRp4\n"
    b"(dp5\nVbound\np6\nF1.0\nsVnorm_before\np7\nF2.0\nsVresidual\np8\nF0.0\nsVdistance\np9\nF0.1\nsViterations\np10\n"
    b"I3\nsb.": sn_fast.ClippedSpectrum(1.0, 2.0, 0.0, 0.1, 3),
}


@pytest.mark.parametrize("stored", STORED, ids=[type(value).__name__ for value in STORED.values()])
def test_results_of_earlier_versions(stored: bytes) -> None:
    assert pickle.loads(stored) == STORED[stored]


def test_operators_and_attacks_are_pickled() -> None:
    op = sn_fast.operator_of(nn.Conv2d(2, 3, 3), (6, 6))
    assert torch.equal(pickle.loads(pickle.dumps(op)).to_dense(), op.to_dense())
    attack = pickle.loads(pickle.dumps(PGD(nn.Linear(3, 2), eps=0.1, steps=2)))
    assert attack.options == {"eps": 0.1, "steps": 2}
    assert attack(torch.zeros(1, 3)).shape == (1, 3)


def test_a_normalised_model_is_saved_by_its_state_dict() -> None:
    """PyTorch pickles no parametrized module, and names the remedy."""
    model = sn_fast.apply_spectral_norm(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match=r"only supported through state_dict\(\)"):
        torch.save(model, io.BytesIO())
