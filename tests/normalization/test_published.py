"""The published code's power iteration and gradients, value by value (the paper's TensorFlow code, in float32)."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sn_fast import spectral_norm, update_spectral_norm
from tests.conftest import REFERENCE
from tests.published import image, kernel, matrix, same_padding

CONVOLUTIONS = ("00", "02", "03", "05", "06", "08", "10", "12", "14")
SN_FILES = [*(f"sn_{n}_conv" for n in CONVOLUTIONS), "sn_18_linear", "sn_20_linear", "sn_22_matrix_conv"]
GRAD_FILES = ["grad_00_conv", "grad_02_conv", "grad_04_conv", "grad_07_linear", "grad_09_matrix_conv"]


def manifest(name: str) -> dict[str, Any]:
    return json.loads((REFERENCE / "manifest.json").read_text())["files"][name + ".npz"]["info"]


class Published:
    """A layer with the published weight and u, and readers for the rest of the file."""

    def __init__(self, name: str, data: dict[str, np.ndarray], gradient: str = "detached") -> None:
        info = manifest(name)
        self.data, self.kind = data, info["kind"]
        weight = data["W"]
        if self.kind == "linear":
            layer: nn.Module = nn.Linear(*weight.shape)
            layer.weight.data = matrix(weight)
        else:
            layer = nn.Conv2d(*weight.shape[2:], weight.shape[0])
            layer.weight.data = kernel(weight)
        if self.kind == "conv":
            layer.stride = (info["stride"],) * 2
            if info["padding"] == "SAME":
                before, after = same_padding(info["u_width"], info["k"], info["stride"])
                assert before == after, "PyTorch's layers pad both sides alike; so do all the published cases"
                layer.padding = (before,) * 2
        size = (info["u_width"],) * 2 if self.kind == "conv" else None
        operator = "reshape" if self.kind == "matrix_conv" else "conv"
        # reduce=False: the published code iterates a 1x1 convolution over the whole image.
        spectral_norm(layer, input_size=size, beta=info["beta"], operator=operator, gradient=gradient, reduce=False)
        self.layer = layer
        self.state = layer.parametrizations.weight[0]

    def vector(self, key: str) -> Tensor:
        a = self.data[key]
        if self.kind == "conv":
            return image(a)[0]
        if self.kind == "matrix_conv" and a.size == np.prod(self.data["W"].shape[:3]):
            return torch.from_numpy(a.reshape(self.data["W"].shape[:3]).transpose(2, 0, 1).copy()).flatten()
        return torch.from_numpy(a.copy()).flatten()

    def weight(self, key: str) -> Tensor:
        return matrix(self.data[key]) if self.kind == "linear" else kernel(self.data[key])

    def set_start(self, key: str) -> None:
        """The published u is v of a convolution (input space) and u of a matrix."""
        (self.state.v if self.kind == "conv" else self.state.u).copy_(self.vector(key))


@pytest.mark.parametrize("name", SN_FILES)
def test_sigma_vectors_and_weight_after_each_run(name: str, published) -> None:
    case = Published(name, published(name + ".npz"))
    case.set_start("u0")
    done = 0
    for run in (1, 2, 5, 20):
        while done < run:
            update_spectral_norm(case.layer)
            done += 1
        ours_u, ours_v = case.state.u, case.state.v
        theirs_u, theirs_v = ours_v, ours_u  # published u is in input space for a convolution ...
        if case.kind != "conv":
            theirs_u, theirs_v = ours_u, ours_v  # ... and in output space for a matrix
        torch.testing.assert_close(theirs_u, case.vector(f"u_{run}"), rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs_v, case.vector(f"v_{run}"), rtol=0, atol=1e-5)
        assert float(case.state.sigma) == pytest.approx(float(case.data[f"sigma_raw_{run}"]), rel=1e-5)
        torch.testing.assert_close(case.layer.weight, case.weight(f"w_norm_{run}"), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SN_FILES)
def test_true_norm(name: str, published) -> None:
    from sn_fast import operator_norm, operator_of
    from sn_fast.layers import LayerOperator

    case = Published(name, published(name + ".npz"))
    raw = case.state.operand(case.state.raw.detach()).double()
    truth = float(case.data["sigma_exact_f64"])
    assert float(operator_norm(LayerOperator(raw, case.state.geometry))) == pytest.approx(truth, rel=1e-6)
    if case.kind != "matrix_conv":
        assert float(operator_norm(operator_of(case.layer, raw=True))) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("gradient", ["full", "frozen"])
@pytest.mark.parametrize("name", GRAD_FILES)
def test_gradient_of_the_normalised_weight(name: str, gradient: str, published) -> None:
    data = published(name + ".npz")
    runs = sorted(int(k.removeprefix("u_in_")) for k in data if k.startswith("u_in_"))
    assert runs
    for run in runs:
        case = Published(name, data, gradient={"full": "full", "frozen": "detached"}[gradient])
        case.set_start(f"u_in_{run}")
        update_spectral_norm(case.layer)
        (case.layer.weight * case.weight("R")).sum().backward()
        ours = case.layer.parametrizations.weight.original.grad
        theirs = case.weight(f"grad_{gradient}_{run}")
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-4, run
