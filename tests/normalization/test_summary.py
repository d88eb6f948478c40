from __future__ import annotations

import torch
from torch import nn

import sn_fast
from sn_fast.layers import MatrixOperator, operator_of
from sn_fast.normalization.summary import spectral_norm_summary


def rows(model: nn.Module) -> dict[str, list[str]]:
    """Cells by layer, operator first."""
    lines = spectral_norm_summary(model).splitlines()
    assert lines[0].split() == ["layer", "operator", "sigma", "beta", "mode", "norm", "in", "use", "at", "most"]
    start = lines[0].index("operator")
    cells = {}
    for line in lines[1:]:
        rest = line[start:].rsplit(maxsplit=4)
        cells[line[:start].strip()] = rest
    return cells


def dense_norm(op: sn_fast.LinearOperator) -> float:
    return float(torch.linalg.svdvals(op.to_dense().detach().double())[0])


def test_sigma_is_of_the_raw_weight_and_the_bound_of_the_one_in_use():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1, groups=2), nn.Flatten(), nn.Linear(128, 5)
    )
    sn_fast.apply_spectral_norm(model, torch.zeros(1, 3, 8, 8), beta={"0": 0.5, ".": 100.0}, n_power_iterations=50)
    found = rows(model)
    assert [found[name][0] for name in "013"] == ["conv 3x3 at 8x8", "conv 3x3 s2 g2 at 8x8", "matrix 5x128"]
    assert [found[name][2:4] for name in "013"] == [["0.5", "cap"], ["100", "cap"], ["100", "cap"]]
    for name in "013":
        layer = model.get_submodule(name)
        assert abs(float(found[name][1]) / sn_fast.sigmas(model)[name] - 1) < 1e-5
        truth = dense_norm(operator_of(layer))
        assert truth <= float(found[name][4]) <= truth * 1.01
    assert abs(float(found["0"][4]) - 0.5) < 5e-3
    assert float(found["1"][4]) > 0.9 * float(found["1"][1])


def test_a_size_that_is_not_known_is_said():
    layer = sn_fast.spectral_norm(nn.ConvTranspose2d(2, 3, 3))
    (cells,) = rows(nn.Sequential(layer)).values()
    assert cells == ["transposed conv 3x3, input size not known before the first forward", "-", "1", "cap", "-"]
    layer(torch.zeros(1, 2, 5, 5))
    (cells,) = rows(nn.Sequential(layer)).values()
    assert cells[0] == "transposed conv 3x3 at 5x5"


def test_a_reshaped_kernel_is_bounded_as_a_matrix():
    layer = sn_fast.spectral_norm(nn.Conv2d(2, 3, 3), operator="reshape", mode="scale", beta=2.0, n_power_iterations=50)
    (cells,) = rows(nn.Sequential(layer)).values()
    assert cells[0] == "reshaped kernel 3x18"
    truth = dense_norm(MatrixOperator(layer.weight.detach().flatten(1)))
    assert truth <= float(cells[4]) <= truth * 1.001
    assert cells[2:4] == ["2", "scale"]


def test_every_size_is_bounded_for_every_size():
    layer = sn_fast.spectral_norm(nn.Conv2d(2, 3, 3, padding=1), input_size="any", beta=0.1)
    (cells,) = rows(nn.Sequential(layer)).values()
    assert cells[0] == "conv 3x3, at every size"
    assert dense_norm(operator_of(layer, (20, 20))) <= float(cells[4]) <= 0.1001


def test_other_names_and_nothing_normalised():
    layer = sn_fast.spectral_norm(nn.LSTMCell(3, 4), name="weight_hh")
    assert list(rows(nn.Sequential(layer))) == ["0.weight_hh"]
    assert list(rows(layer)) == ["weight_hh"]
    assert list(rows(sn_fast.spectral_norm(nn.Linear(2, 2)))) == ["(the layer)"]
    assert spectral_norm_summary(nn.Linear(2, 2)) == "no layer is normalised by sn_fast"


def test_nothing_moves():
    model = sn_fast.apply_spectral_norm(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), torch.zeros(1, 6)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spectral_norm_summary(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_the_bound_is_rounded_up():
    layer = nn.Linear(1, 1)
    layer.weight.data.fill_(0.1234561)
    (cells,) = rows(sn_fast.spectral_norm(layer)).values()
    assert cells[1] == "0.123456"
    assert float(cells[4]) >= 0.123457
