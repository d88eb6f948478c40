"""Networks with the published variables against the published logits, sigmas, gradients, attacks and layer tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from sn_fast import frozen_sigma, sigmas
from sn_fast.attacks import fgm, pgd, wrm
from sn_fast.experiments import build_network, load_published
from sn_fast.experiments.networks import published_names
from tests.conftest import REFERENCE
from tests.published import image

from .variables import description, drawn_all, of_file

RUNS = sorted(np.load(REFERENCE / "arch_logits.npz").files) if (REFERENCE / "arch_logits.npz").exists() else ["absent"]
FILES = sorted(path.name for path in REFERENCE.glob("attack_*.npz")) or ["absent"]


@pytest.mark.parametrize("run", RUNS)
def test_logits_and_sigmas(run: str, published) -> None:
    logits = published("arch_logits.npz")[run]
    about = description("manifest.json")["files"]["arch_logits.npz"]["info"]["archs"][run]
    name, mode = run.split(".")
    channels = about["channels"]
    network = build_network(name, in_channels=channels, beta=about["beta"] or math.inf, seed=0)
    load_published(network, drawn_all({variable: tuple(shape) for variable, shape, _ in about["variables"]}))
    x = np.random.RandomState(123 + channels).randn(about["batch"], 28, 28, channels).astype(np.float32)
    ours = network.train(mode == "train")(image(x)).detach().numpy()
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    found = {layer.replace(".", "/"): sigma for layer, sigma in sigmas(network).items()}
    assert found == pytest.approx(about["sigma_raw"], rel=1e-5)
    assert sum(p.numel() for p in network.parameters()) == about["n_params"]
    trainable = {variable for variable, _, learns in about["variables"] if learns}
    assert len(trainable) == len(list(network.parameters()))


TABLES = {
    "alexnet_sn": (3, 28),
    "elunet_sn": (1, 28),
    "inception_sn": (3, 28),
    "resnet_sn": (3, 28),
    "mlp1_elu_sn": (3, 28),
    "mlp2_elu_sn": (3, 28),
    "softmax_sn": (3, 28),
    "vgg_sn": (3, 28),
    "resnet_sn_large": (3, 28),
}


@pytest.mark.parametrize("name", TABLES)
def test_layer_tables(name: str) -> None:
    tables = description("layer_tables.json")
    table = tables.get(name) or tables[f"{name}(28x28)"]
    channels, size = TABLES[name]
    with torch.device("meta"):
        network = build_network(name, in_channels=channels, image_size=size, beta=1.6)
        rows = layer_rows(network, torch.zeros(1, channels, size, size))
    assert rows == {name: [*sizes, after] for kind, name, *sizes, _, after in table["rows"] if kind in ("conv", "fc")}
    assert sum(p.numel() for p in network.parameters()) == table["params"]
    shapes = published_names(network)
    assert {name: list(shape) for name, shape in shapes.items() if name.endswith("/u")} == table["u"]


def layer_rows(network: nn.Module, x: torch.Tensor) -> dict[str, list]:
    """Input size, kernel, stride and output size of every layer, as in the published tables."""
    rows: dict[str, list] = {}

    def note(name: str):
        def hook(layer, inputs, output):
            before, after = inputs[0].shape[1:], output.shape[1:]
            if isinstance(layer, nn.Linear):
                rows[name] = [[*before], [layer.in_features, layer.out_features], "", [*after]]
            else:
                kernel = [*layer.kernel_size, layer.in_channels, layer.out_channels]
                sizes = [[*shape[1:], shape[0]] for shape in (before, after)]
                rows[name] = [sizes[0], kernel, layer.stride[0], sizes[1]]

        return hook

    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(note(name.replace(".", "/")))
    network(x)
    return rows


@pytest.mark.parametrize("file", FILES)
def test_attacks_on_the_published_network(file: str, published) -> None:
    """Every recorded attack, also of networks with spectral normalisation, whose vectors stay as they are loaded."""
    arrays = published(file)
    about = description("manifest.json")["files"][file]["info"]
    size, channels = arrays["x"].shape[1], arrays["x"].shape[3]
    beta = about["beta"] if about["spectral_norm"] else math.inf
    name = "small_elu_sn" if about["spectral_norm"] else "small_elu"
    network = build_network(
        name, in_channels=channels, num_classes=arrays["fc.bias"].shape[0], image_size=size, beta=beta
    )
    load_published(network, of_file(arrays))
    network.eval()
    x, y = image(arrays["x"]), torch.from_numpy(arrays["y"])
    np.testing.assert_allclose(network(x).detach().numpy(), arrays["logits"], rtol=0, atol=1e-5)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(network(leaf), y, reduction="sum"), leaf)
    np.testing.assert_allclose(gradient.permute(0, 2, 3, 1).numpy(), arrays["grad_y"], rtol=0, atol=1e-5)
    before = sigmas(network)
    with frozen_sigma(network):
        for key, config in about["configs"].items():
            ours = run_attack(network, x, y if config["labels"] == "true y" else None, config)
            np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), arrays[key], rtol=0, atol=1e-4, err_msg=key)
    assert sigmas(network) == before


def run_attack(network: nn.Module, x: torch.Tensor, y: torch.Tensor | None, config: dict) -> torch.Tensor:
    extra, eps = config["extra"], config["eps"]
    if config["method"] == "wrm":
        return wrm(network, x, y, eps=eps, steps=config["k"])
    norm = config["order"]
    clip = (extra["clip_min"], extra["clip_max"]) if "clip_min" in extra else None
    if config["method"] == "fgm":
        return fgm(network, x, y, norm=norm, eps=eps, clip=clip)
    return pgd(network, x, y, norm=norm, eps=eps, steps=config["k"], alpha=extra.get("a"), clip=clip)


def small_network() -> tuple[nn.Module, dict[str, np.ndarray]]:
    network = build_network("small_elu_sn", in_channels=1, num_classes=5, image_size=12, beta=0.5, seed=0)
    return network, drawn_all(published_names(network))


def test_names_and_shapes() -> None:
    network, _ = small_network()
    assert published_names(network) == {
        "conv1/weights_SN/u": (1, 12, 12, 1),
        "conv1/weights": (3, 3, 1, 6),
        "conv1/bias": (6,),
        "conv2/weights_SN/u": (1, 12, 12, 6),
        "conv2/weights": (3, 3, 6, 8),
        "conv2/bias": (8,),
        "fc/weights_SN/u": (1, 5),
        "fc/weights": (288, 5),
        "fc/bias": (5,),
    }
    with torch.device("meta"):
        names = published_names(build_network("resnet_bn", in_channels=3))
        assert names["block_layer1/block0/batch_normalization_1/gamma"] == (16,)
        assert names["batch_normalization/moving_variance"] == (128,)
        assert "conv1/batch_normalization/beta" in published_names(build_network("vgg_sn", in_channels=3))
        reshaped = published_names(build_network("alexnet_miyato_sn", in_channels=3, beta=1.0))
        assert reshaped["conv2/weights_SN/u"] == (1, 256)


def test_loading_gives_the_published_function() -> None:
    """One power iteration from u in float64, and sums over windows."""
    network, variables = small_network()
    load_published(network, variables)
    x = np.random.default_rng(0).normal(size=(2, 12, 12, 1))
    logits = network(image(x).float()).detach().numpy()
    np.testing.assert_allclose(logits, reference(variables, x, beta=0.5), rtol=0, atol=1e-5)
    assert torch.equal(network(image(x).float()), network(image(x).float()))  # u has moved once, and no more


def reference(variables: dict[str, np.ndarray], x: np.ndarray, beta: float) -> np.ndarray:
    v = {name: a.astype(np.float64) for name, a in variables.items()}

    def windows(a: np.ndarray, stride: int) -> np.ndarray:
        before = 1 if stride == 1 else 0  # SAME, 3 x 3, even size
        a = np.pad(a, ((0, 0), (before, 1), (before, 1), (0, 0)))
        return np.lib.stride_tricks.sliding_window_view(a, (3, 3), axis=(1, 2))[:, ::stride, ::stride]  # b h w c i j

    def conv(a: np.ndarray, name: str, stride: int) -> np.ndarray:
        return np.einsum("bhwcij,ijco->bhwo", windows(a, stride), v[f"{name}/weights"])

    def dense(name: str, stride: int, size: int) -> np.ndarray:
        channels = v[f"{name}/weights"].shape[2]
        basis = np.eye(size * size * channels).reshape(-1, size, size, channels)
        return conv(basis, name, stride).reshape(len(basis), -1)  # in, out

    def unit(a: np.ndarray) -> np.ndarray:
        return a / np.linalg.norm(a)

    def scale(matrix: np.ndarray, u: np.ndarray) -> float:
        left = unit(u @ matrix)
        right = unit(left @ matrix.T)
        return max(1.0, float(right @ matrix @ left) / beta)

    strides = {"conv1": 1, "conv2": 2}
    maps = {name: dense(name, stride, 12) for name, stride in strides.items()} | {"fc": v["fc/weights"].T}
    scales = {name: scale(matrix, v[f"{name}/weights_SN/u"].ravel()) for name, matrix in maps.items()}
    assert min(scales.values()) > 1
    for name, stride in strides.items():
        x = conv(x, name, stride) / scales[name] + v[f"{name}/bias"]
        x = np.where(x > 0, x, np.expm1(x))
    return x.reshape(len(x), -1) @ v["fc/weights"] / scales["fc"] + v["fc/bias"]


def test_names_as_they_are_in_files() -> None:
    network, variables = small_network()
    twin = build_network("small_elu_sn", in_channels=1, num_classes=5, image_size=12, beta=0.5, seed=1)
    load_published(network, variables)
    load_published(twin, {name.replace("/", ".") + ":0" * (i % 2): a for i, (name, a) in enumerate(variables.items())})
    x = torch.randn(2, 1, 12, 12)
    assert torch.equal(network(x), twin(x))


def test_what_does_not_fit_is_one_line_and_loads_nothing() -> None:
    network, variables = small_network()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    rest = {name: a for name, a in variables.items() if name != "conv2/bias"}
    cases = [
        (rest, "missing: conv2/bias$"),
        (variables | {"conv9/bias": np.zeros(3)}, "not in the network: conv9/bias$"),
        (rest | {"conv9/bias": np.zeros(3)}, "missing: conv2/bias; not in the network: conv9/bias$"),
        ({}, "missing: conv1/weights_SN/u, conv1/weights, conv1/bias, conv2/weights_SN/u and 5 more"),
        (variables | {"fc/bias": np.zeros(4)}, r"variable 'fc/bias' has shape \(4,\); the network takes \(5,\)"),
        (variables | {"fc/weights": np.zeros((5, 288))}, r"has shape \(5, 288\); the network takes \(288, 5\)"),
        ({n: a for n, a in variables.items() if not n.endswith("/u")}, "missing: .*build the network with beta=inf"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message) as raised:
            load_published(network, given)
        assert "\n" not in str(raised.value)
    with pytest.raises(TypeError, match="variable 'fc/bias' is no array of real numbers"):
        load_published(network, variables | {"fc/bias": np.array(["a"] * 5)})
    plain = build_network("small_elu_sn", in_channels=1, num_classes=5, image_size=12)
    with pytest.raises(ValueError, match=r"not in the network: .*build the network with a finite beta"):
        load_published(plain, variables)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())


def test_batch_normalisation() -> None:
    network = build_network("inception", in_channels=1, image_size=9, seed=0)
    variables = drawn_all(published_names(network))
    load_published(network, variables)
    layer = network.incept2.conv_ch1_bn
    scope = "incept2/conv_ch1/batch_normalization/"
    found = {"gamma": layer.weight, "beta": layer.bias, "moving_mean": layer.running_mean}
    found["moving_variance"] = layer.running_var
    for part, tensor in found.items():
        np.testing.assert_array_equal(tensor.detach().numpy(), variables[scope + part])
