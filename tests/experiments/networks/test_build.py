"""Networks by name: shapes, seeds, options, and one clear line for what cannot be built."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sn_fast import operator_norm, operator_of, sigmas, update_spectral_norm
from sn_fast.experiments import build_network, network_names
from sn_fast.experiments.networks import Architecture, architecture, parameter_groups, registry
from sn_fast.experiments.networks.stack import Stack

NAMES = network_names()
NORMALIZED = [name for name in NAMES if "_sn" in name]
LIGHT = ["mlp2_elu_sn", "elunet_sn", "small_lrn_sn", "small_elu_sn", "softmax_sn", "mlp1_relu", "small_lrn"]
# Of the paper, at 3 channels (ELU-Net: 1), 10 classes and 28 x 28 pixels.
PARAMETERS = {
    "alexnet": 4_237_130,
    "elunet": 710_218,
    "inception_sn": 1_810_682,
    "inception": 1_814_106,
    "resnet": 1_481_146,
    "resnet_sn_large": 38_947_018,
    "mlp1_relu": 1_209_866,
    "mlp2_elu": 1_472_522,
    "softmax": 23_530,
    "vgg": 4_957_002,
}


def raw_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    return {n.replace("parametrizations.weight.original", "weight"): p for n, p in network.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_every_architecture(name: str) -> None:
    with torch.device("meta"):
        network = build_network(name, in_channels=2, num_classes=7, image_size=32)
        assert network(torch.zeros(3, 2, 32, 32)).shape == (3, 7)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_numbers_of_parameters(name: str) -> None:
    with torch.device("meta"):
        network = build_network(name, in_channels=1 if name == "elunet" else 3)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


FAMILIES = ["alexnet_sn", "elunet_sn", "vgg_sn", "inception_sn", "resnet_sn", "mlp2_relu_sn", "small_lrn_sn"]


@given(
    name=st.sampled_from(FAMILIES),
    channels=st.integers(1, 4),
    classes=st.integers(1, 12),
    height=st.integers(1, 48),
    width=st.integers(1, 48),
)
def test_drawn_images_fit_or_are_refused(name: str, channels: int, classes: int, height: int, width: int) -> None:
    with torch.device("meta"):
        try:
            network = build_network(name, in_channels=channels, num_classes=classes, image_size=(height, width))
        except ValueError as error:
            assert min(height, width) < {"elunet_sn": 25, "vgg_sn": 16}.get(name, 9)
            assert str(error).startswith(f"image_size: {height} x {width} is too small; layer ")  # noqa: PT017
            return
        assert network(torch.zeros(2, channels, height, width)).shape == (2, classes)


@pytest.mark.parametrize("name", ["elunet_sn", "mlp1_relu_sn", "resnet_sn", "alexnet_miyato_sn"])
def test_equal_seeds_give_equal_weights_for_every_beta_and_twin(name: str) -> None:
    plain, capped, other = (
        build_network(name, in_channels=1, beta=b, seed=s) for b, s in ((math.inf, 4), (1, 4), (1, 5))
    )
    twin = build_network(name.replace("_miyato", "").removesuffix("_sn"), in_channels=1, seed=4)
    wanted = raw_weights(plain)
    for network in (capped, twin):
        found = raw_weights(network)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not torch.equal(raw_weights(other)["fc.weight"], wanted["fc.weight"])


def test_random_state() -> None:
    before = torch.get_rng_state()
    build_network("elunet_sn", in_channels=1, beta=1.0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    networks = []
    for _ in range(2):
        torch.manual_seed(3)
        networks += [build_network("mlp1_relu", in_channels=1) for _ in range(2)]
    a, b, c, d = (network.fc.weight for network in networks)
    assert torch.equal(a, c)
    assert torch.equal(b, d)
    assert not torch.equal(a, b)


def test_initial_weights() -> None:
    network = build_network("alexnet", in_channels=3, seed=0)
    for name, fan_in, fan_out in (("conv2", 25 * 96, 25 * 256), ("linear1", 9216, 384)):
        weight, limit = network.get_submodule(name).weight, math.sqrt(6 / (fan_in + fan_out))
        assert 0.999 * limit < float(weight.detach().abs().max()) <= limit
        assert float(weight.detach().std()) == pytest.approx(limit / math.sqrt(3), rel=0.01)
        assert not network.get_submodule(name).bias.any()
    network = build_network("resnet", in_channels=3, seed=0)
    weight = network.get_submodule("block_layer3.block1.conv1").weight.detach()
    assert float(weight.var()) == pytest.approx(1 / (9 * 128), rel=0.02)
    assert float(weight.abs().max()) <= 2 / math.sqrt(9 * 128) / 0.879625 * 1.0001
    assert float(network.fc.weight.detach().abs().max()) <= math.sqrt(6 / 138)


@pytest.mark.parametrize("name", ["elunet_sn", "mlp2_relu_sn", "small_elu_sn", "alexnet_snl2"])
def test_beta_caps_the_true_norm_of_every_layer(name: str) -> None:
    size = 12 if name == "small_elu_sn" else 28
    network = build_network(name, in_channels=1, image_size=size, beta=0.5, seed=0)
    update_spectral_norm(network, 30)
    layers = [n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert set(sigmas(network)) == set(layers) - ({"fc"} if name == "alexnet_snl2" else set())
    for layer in sigmas(network):
        norm = operator_norm(operator_of(network.get_submodule(layer)), tol=1e-3)
        assert float(norm.detach()) == pytest.approx(0.5, rel=0.01)


def test_the_norm_of_the_reshaped_kernel() -> None:
    network = build_network("alexnet_miyato_sn", in_channels=1, beta=0.3, seed=0)
    update_spectral_norm(network, 30)
    for layer in (network.conv1, network.conv2, network.linear2):
        norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
        assert float(norm) == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("name", LIGHT)
def test_copies_and_state_dicts(name: str) -> None:
    beta = 0.8 if name in NORMALIZED else math.inf
    network = build_network(name, in_channels=1, beta=beta, seed=0)
    x = torch.randn(2, 1, 28, 28)
    twin = build_network(name, in_channels=1, beta=beta, seed=1)
    assert not torch.equal(twin(x), network(x))
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer))
    assert torch.equal(twin(x), network(x))
    assert torch.equal(copy.deepcopy(network)(x), network(x))
    if math.isinf(beta):
        assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))


BAD = [
    ({"name": "alexnetsn"}, "network 'alexnetsn' is unknown; did you mean alexnet_sn"),
    ({"name": "transformer"}, "network 'transformer' is unknown; there are alexnet, "),
    ({"name": 3}, "network 3 is unknown"),
    ({"in_channels": 0}, "in_channels=0 must be an integer >= 1"),
    ({"in_channels": 1.5}, "in_channels=1.5 must"),
    ({"num_classes": -1}, "num_classes=-1 must"),
    ({"num_classes": True}, "num_classes=True must"),
    ({"image_size": 0}, "image_size=0: give"),
    ({"image_size": (28, 28, 1)}, r"image_size=\(28, 28, 1\): give"),
    ({"image_size": "28"}, "image_size='28': give"),
    (
        {"name": "elunet", "image_size": 20},
        "image_size: 20 x 20 is too small; layer 'conv3' takes windows of 5 x 5 from 3 x 3",
    ),
    ({"beta": 0}, "beta=0 must be a number above 0"),
    ({"beta": math.nan}, "beta=nan must"),
    ({"beta": "2"}, "beta='2' must"),
    ({"name": "vgg", "beta": 2.0}, "beta=2.0: vgg has no spectral normalisation; leave beta out"),
    ({"seed": 0.5}, "seed=0.5 must be an integer or None"),
    ({"weight_decay": -1.0}, "weight_decay=-1.0 must be a number >= 0"),
    ({"weight_decay": 1e-3}, "weight_decay=0.001: mlp1_relu_sn decays no layer"),
    ({"nb_filters": 3}, "mlp1_relu_sn has no option 'nb_filters'; its options are activation, hidden_layers, width"),
    ({"name": "vgg", "width": 3}, "vgg has no option 'width'; it has no options"),
    ({"width": 0}, "layer 'hidden' cannot have 0 units or channels"),
    ({"name": "elunet", "nb_filters": -2}, "layer 'conv1' cannot have -2 units or channels"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_cannot_be_built_is_one_line(change: dict, message: str) -> None:
    arguments = {"name": "mlp1_relu_sn", "in_channels": 1} | change
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        build_network(arguments.pop("name"), **arguments)
    assert "\n" not in str(raised.value)


def test_numbers_of_numpy() -> None:
    three, classes, beta = np.int64(3), np.int32(5), np.float32(0.5)
    network = build_network("mlp1_relu_sn", in_channels=three, num_classes=classes, beta=beta, seed=np.int64(1))
    assert network(torch.zeros(1, 3, 28, 28)).shape == (1, 5)


def test_options_of_the_normalisation() -> None:
    network = build_network("elunet_sn", in_channels=1, beta=1.0, spectral_norm={"gradient": "full", "bound": False})
    assert {m.parametrizations.weight[0].options.gradient for m in (network.conv1, network.fc)} == {"full"}


def test_an_architecture_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))

    @architecture("tiny", width=4)
    @architecture("tiny_sn", width=4, normalized="conv")
    def tiny(image_shape, num_classes, *, width):
        stack = Stack(image_shape)
        stack.conv("conv1", width, 3, stride=2)
        stack.linear("fc", num_classes)
        return stack.network()

    @architecture("tiny_wd", normalized="conv", weight_decay={"^fc$": 0.1})
    def tiny_wd(image_shape, num_classes):
        return tiny(image_shape, num_classes, width=2)

    assert {"tiny", "tiny_sn"} <= set(network_names())
    network = build_network("tiny_sn", in_channels=2, image_size=9, beta=0.1, width=3)
    assert network.conv1.out_channels == 3
    assert set(sigmas(network)) == {"conv1", "fc"}
    assert isinstance(registry.architecture_of("tiny"), Architecture)
    decaying = build_network("tiny_wd", in_channels=1, image_size=9, beta=0.1)
    (decayed,) = (group["params"] for group in parameter_groups(decaying) if group["weight_decay"] == 0.1)
    assert decayed == [decaying.fc.parametrizations.weight.original]
    with pytest.raises(ValueError, match="'tiny' is registered already"):
        architecture("tiny")(tiny)
    with pytest.raises(ValueError, match="normalized='matrix'"):
        architecture("other", normalized="matrix")


DECAYED = {"alexnet_wd": 5, "alexnet_snl2": 1, "vgg_snl2": 1, "inception_snl2": 1, "elunet": 4}


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_group(name: str) -> None:
    with torch.device("meta"):
        network = build_network(name, in_channels=1, weight_decay=1e-3 if name in DECAYED else None)
    groups = parameter_groups(network)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(map(id, network.parameters()))
    decayed = [p for group in groups for p in group["params"] if group["weight_decay"]]
    assert len(decayed) == DECAYED.get(name, 0)
    assert all(p.ndim > 1 for p in decayed)
    assert {group["weight_decay"] for group in groups} <= {0.0, 1e-3}


def test_published_factor_of_weight_decay() -> None:
    with torch.device("meta"):
        factors = [group["weight_decay"] for group in parameter_groups(build_network("alexnet_wd", in_channels=3))]
    assert factors == [0.0, 5e-4]


@settings(max_examples=10)
@given(width=st.integers(1, 5), stages=st.integers(1, 3), blocks=st.integers(1, 3), bn=st.booleans())
def test_residual_networks_of_other_widths(width: int, stages: int, blocks: int, bn: bool) -> None:
    widths = [width * (i + 1) for i in range(stages)]
    network = build_network("resnet", in_channels=1, image_size=9, widths=widths, blocks=blocks, batch_normalization=bn)
    assert network(torch.randn(2, 1, 9, 9)).shape == (2, 10)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == bn * (2 * stages * blocks + 1)


def test_intended_widths() -> None:
    with torch.device("meta"):
        assert build_network("resnet_intended_sn", in_channels=3).fc.in_features == 64
        assert build_network("resnet_intended_sn_large", in_channels=3).fc.in_features == 256


def test_the_page_on_networks_names_them() -> None:
    page = (Path(__file__).parents[3] / "docs" / "networks.md").read_text()
    shown = set(re.findall(r"`([a-z0-9_]+)`", page))
    assert {"alexnet", "elunet_sn", "resnet_sn_large", "mlp2_elu", "vgg_snl2"} <= shown & set(NAMES)
