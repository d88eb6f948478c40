"""clip_spectrum: the layer's true operator ends within beta, by the nearest weight, and small singular values stay."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from sn_fast import operator_of, spectral_norm
from sn_fast.norms import clip, operator_norm_bound
from sn_fast.norms.clip import clip_spectrum
from tests.layers.geometries import Case, cases

_LAYERS: dict[bool, tuple[type[nn.Module], ...]] = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


def layer_of(case: Case) -> nn.Module:
    kind = _LAYERS[case.transposed][len(case.kernel) - 1]
    layer = kind(case.cin, case.cout, case.kernel, groups=case.groups, bias=False, dtype=torch.float64, **case.options)
    with torch.no_grad():
        layer.weight.copy_(case.weight())
    return layer


def dense(layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    """The matrix of the layer, by running PyTorch's own forward on unit inputs."""
    layer = copy.deepcopy(layer).double()
    shape = (layer.in_channels, *size) if size else (layer.in_features,)
    inputs = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return (layer(inputs) - layer(torch.zeros_like(inputs[:1]))).flatten(1).T


def singular_values(layer: nn.Module, size: tuple[int, ...] = ()) -> Tensor:
    return torch.linalg.svdvals(dense(layer, size))


def conv(*args: Any, norm: float = 3.0, size: tuple[int, ...] = (8, 8), **kwargs: Any) -> nn.Conv2d:
    """A Conv2d whose norm at this input size is about this."""
    layer = nn.Conv2d(*args, **{"bias": False, "dtype": torch.float64} | kwargs)
    with torch.no_grad():
        layer.weight.mul_(norm / singular_values(layer, size)[0])
    return layer


def clippable(case: Case) -> bool:
    symmetric = isinstance(case.options["padding"], str) or isinstance(case.options["padding"][0], int)
    return symmetric and case.options.get("padding_mode", "zeros") in ("zeros", "circular")


@settings(max_examples=200)
@given(case=cases(max_size=6).filter(clippable), fraction=st.sampled_from([0.01, 0.4, 0.9]))
def test_no_singular_value_is_left_above_beta(case: Case, fraction: float) -> None:
    layer = layer_of(case)
    beta = fraction * float(singular_values(layer, case.input_size)[0]) + 1e-3
    result = clip_spectrum(layer, beta, input_size=case.input_size, max_iterations=4)
    assert result.bound <= beta
    sizes = [case.input_size]
    if case.options.get("padding_mode", "zeros") == "zeros":
        sizes.append(tuple(h + 2 for h in case.input_size))
    for size in sizes:
        assert singular_values(layer, size)[0] <= beta


GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1, "size": 8},
    "odd grid": {"kernel_size": 3, "padding": 1, "size": 7},
    "strided": {"kernel_size": 4, "padding": 1, "stride": 2, "size": 8},
    "kernel no multiple of the stride": {"kernel_size": 5, "padding": 2, "stride": 3, "size": 9},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2, "size": 7},
    "dilation shares a factor with the period": {"kernel_size": 3, "padding": 2, "dilation": 2, "size": 8},
    "dilation shares a factor with the stride": {
        "kernel_size": 4,
        "padding": 3,
        "dilation": 2,
        "stride": 4,
        "size": 12,
    },
    "dilation coprime to the stride": {"kernel_size": 4, "padding": 3, "dilation": 3, "stride": 2, "size": 10},
    "kernel wraps round": {"kernel_size": 5, "padding": 2, "size": 3},
    "kernel wraps round one frequency": {"kernel_size": 5, "padding": 2, "stride": 4, "size": 4},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2, "size": 6},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_nearest_weight_as_an_independent_solver_finds_it(name: str) -> None:
    options = dict(GEOMETRIES[name])
    size = (options.pop("size"),)
    layer = nn.Conv1d(4, 2, padding_mode="circular", bias=False, dtype=torch.float64, **options)
    given_weight = layer.weight.detach().clone()
    beta = 0.5 * float(singular_values(layer, size)[0])
    expected = nearest_by_admm(layer, size, beta)
    result = clip_spectrum(layer, beta, input_size=size, max_iterations=3000, tol=1e-9)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=2e-5)
    assert result.distance == pytest.approx(float((expected - given_weight).norm() / given_weight.norm()), rel=1e-4)


def nearest_by_admm(layer: nn.Module, size: tuple[int, ...], beta: float, rho: float = 1.0) -> Tensor:
    """argmin |x - w| with the dense matrix of x within beta: ADMM on the full matrix, no Fourier transform."""
    w = layer.weight.detach().flatten()
    inputs = torch.eye(layer.in_channels * size[0], dtype=w.dtype).reshape(-1, layer.in_channels, *size)

    def matrix(x: Tensor) -> Tensor:
        return functional_call(layer, {"weight": x.reshape(layer.weight.shape)}, inputs).flatten(1).T

    entries = torch.stack([matrix(e).flatten() for e in torch.eye(len(w), dtype=w.dtype)], dim=1).detach()
    shape = matrix(w).shape
    solve = torch.linalg.inv(torch.eye(len(w), dtype=w.dtype) + rho * entries.T @ entries)
    z = u = torch.zeros(len(entries), dtype=w.dtype)
    for _ in range(3000):
        x = solve @ (w + rho * entries.T @ (z - u))
        left, s, right = torch.linalg.svd((entries @ x + u).reshape(shape), full_matrices=False)
        z = ((left * s.clamp_max(beta)) @ right).flatten()
        u = u + entries @ x - z
    assert (entries @ x - z).norm() < 1e-6
    return x.reshape(layer.weight.shape)


def test_zero_padding_moves_hardly_farther_than_a_long_circle() -> None:
    """A circle of 64 needs at most the distance that every size needs, and hardly less."""
    layer = nn.Conv1d(3, 3, 3, padding=1, bias=False, dtype=torch.float64)
    circle = nn.Conv1d(3, 3, 3, padding=1, padding_mode="circular", bias=False, dtype=torch.float64)
    circle.load_state_dict(layer.state_dict())
    beta = 0.5 * float(singular_values(circle, (64,))[0])
    kwargs: dict[str, Any] = {"max_iterations": 2000, "tol": 1e-7}
    least = clip_spectrum(circle, beta, input_size=64, **kwargs).distance
    assert least <= clip_spectrum(layer, beta, **kwargs).distance * (1 + 1e-6) <= 1.03 * least


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize(("beta", "gain", "kept"), [(1.0, 1.5, 0.5), (2.4, 1.15, 0.92)])
def test_small_singular_values_keep_what_scaling_takes_from_them(
    padding_mode: str, beta: float, gain: float, kept: float
) -> None:
    layer = conv(8, 8, 3, padding=1, padding_mode=padding_mode)
    before = singular_values(layer, (8, 8))
    clip_spectrum(layer, beta, input_size=(8, 8))
    after = singular_values(layer, (8, 8))
    for quantile in (0.25, 0.5):
        value, was = float(after.quantile(quantile)), float(before.quantile(quantile))
        assert value > gain * was * beta / float(before[0])
        assert value > kept * was


@pytest.mark.parametrize(
    ("geometry", "size", "beta", "gain"),
    [
        ({"kernel_size": 3, "stride": 2, "padding": 1}, 7, 1.0, 0.0),  # where clipping ends farther away than scaling
        ({"kernel_size": 2, "padding": 1}, 6, 1.0, 0.03),
        ({"kernel_size": 2, "padding": 1}, 6, 2.4, 0.015),
    ],
)
def test_circular_padding_that_is_not_diagonal_in_frequency(
    geometry: dict[str, int], size: int, beta: float, gain: float
) -> None:
    layer = conv(4, 4, padding_mode="circular", size=(size, size), **geometry)
    result = clip_spectrum(layer, beta, input_size=(size, size))
    assert 0.999 * beta < singular_values(layer, (size, size))[0] <= beta
    assert result.distance < 1 - beta / 3 + 1e-6 - gain


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_a_matrix_is_clipped_as_by_its_svd(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    layer = nn.Linear(*shape, dtype=dtype)
    u, s, vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    beta = float(s.median())
    result = clip_spectrum(layer, beta)
    expected = (u * s.clamp_max(beta)) @ vh
    tolerance = max(2e-6, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(layer.weight.detach().double(), expected, rtol=0, atol=tolerance)
    assert result.iterations == 1
    assert result.residual < 1e-12
    assert singular_values(layer)[0] <= beta


def test_a_patch_convolution_and_an_embedding_are_matrices() -> None:
    patches, embedding = nn.Conv2d(3, 5, 4, stride=4, dtype=torch.float64), nn.Embedding(9, 5, dtype=torch.float64)
    for layer, size in ((patches, (8, 8)), (embedding, None)):
        w = layer.weight.detach()
        u, s, vh = torch.linalg.svd(w.flatten(1), full_matrices=False)
        expected = ((u * s.clamp_max(0.5 * s[0])) @ vh).reshape(w.shape)
        result = clip_spectrum(layer, 0.5 * float(s[0]), input_size=size)
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=3e-4, atol=0)
        assert result.iterations == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_the_bound_is_certified_after_rounding(dtype: torch.dtype, padding_mode: str) -> None:
    layer = conv(6, 4, 3, padding=1, padding_mode=padding_mode, dtype=dtype)
    beta = 0.7
    result = clip_spectrum(layer, beta, input_size=(8, 8), max_iterations=15)
    assert layer.weight.dtype == dtype
    method = "fft" if padding_mode == "zeros" else "auto"
    assert float(operator_norm_bound(operator_of(layer, (8, 8)), method=method)) == result.bound <= beta
    assert result.bound > 0.98 * beta
    assert singular_values(layer, (8, 8))[0] <= beta
    # What has been clipped once is within beta.
    assert clip_spectrum(layer, beta, input_size=(8, 8)).iterations == 0


@pytest.mark.parametrize("layer", [nn.Linear(5, 4), nn.Conv2d(3, 4, 3, padding=1), nn.Conv1d(2, 2, 1)])
def test_a_layer_within_beta_is_not_touched(layer: nn.Module) -> None:
    weight, version = layer.weight.detach().clone(), layer.weight._version
    result = clip_spectrum(layer, 10.0)
    assert torch.equal(layer.weight, weight)
    assert layer.weight._version == version
    assert result == clip.ClippedSpectrum(result.bound, result.bound, 0.0, 0.0, 0)


def test_the_parameter_stays_the_same_object() -> None:
    layer = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)
    weight, version, strides = layer.weight, layer.weight._version, layer.weight.stride()
    bias = layer.bias.detach().clone()
    clip_spectrum(layer, 0.3, max_iterations=3)
    assert layer.weight is weight
    assert weight.requires_grad
    assert weight.is_leaf
    assert weight.grad is None
    assert weight._version == version + 1
    assert weight.stride() == strides
    assert torch.equal(layer.bias, bias)


def test_a_group_within_beta_keeps_its_weight() -> None:
    layer = conv(4, 4, 3, padding=1, padding_mode="circular", groups=2)
    with torch.no_grad():
        layer.weight[2:] *= 0.1
    small = layer.weight.detach()[2:].clone()
    clip_spectrum(layer, 1.0, input_size=(8, 8), max_iterations=300, tol=1e-6)
    torch.testing.assert_close(layer.weight.detach()[2:], small, rtol=1e-3, atol=0)


def test_iterations_end_at_the_tolerance_or_at_their_limit() -> None:
    weight = conv(4, 4, 3, padding=1, norm=1.5).weight.detach()

    def run(**kwargs: Any) -> clip.ClippedSpectrum:
        layer = conv(4, 4, 3, padding=1)
        with torch.no_grad():
            layer.weight.copy_(weight)
        return clip_spectrum(layer, 1.0, **kwargs)

    limited, loose, tight = run(max_iterations=2), run(tol=0.05), run(tol=1e-4, max_iterations=1000)
    assert limited.iterations == 2
    assert limited.residual > 0.01
    assert limited.bound <= 1
    assert 2 < loose.iterations < 20
    assert loose.residual <= 0.05
    assert loose.iterations < tight.iterations < 300  # without restarts twice as many
    assert tight.residual <= 1e-4
    assert limited.norm_before == loose.norm_before > 1.5


@pytest.mark.parametrize(
    ("scale", "beta", "dtype"),
    [
        (1e30, 1e29, torch.float32),
        (1e-30, 1e-31, torch.float32),
        (1e200, 1e199, torch.float64),
        (1e-200, 1e-201, torch.float64),
        (1e150, 1e-150, torch.float64),
        (1.0, 1e-9, torch.float16),
        (1.0, 1e-310, torch.float64),
        (1e200, 1e-200, torch.float64),
        (1e-318, 2e-319, torch.float64),
    ],
)
@pytest.mark.parametrize("kind", ["matrix", "convolution"])
def test_scales_at_the_ends_of_the_format(scale: float, beta: float, dtype: torch.dtype, kind: str) -> None:
    layer = nn.Linear(6, 5, dtype=dtype) if kind == "matrix" else nn.Conv1d(3, 2, 3, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, dtype=torch.float64) * scale)
    result = clip_spectrum(layer, beta, max_iterations=10)
    assert result.bound <= beta < result.norm_before
    assert bool(torch.isfinite(layer.weight).all())
    if beta / scale == pytest.approx(0.1):
        assert result.bound > 0.99 * beta


@pytest.mark.parametrize("limit", ["_CHUNK_BYTES", "_SYMBOLS_BYTES"])
def test_little_memory(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = conv(3, 5, 3, stride=2, padding=1)
    small = conv(3, 5, 3, stride=2, padding=1)
    small.load_state_dict(plain.state_dict())
    expected = clip_spectrum(plain, 1.0)
    monkeypatch.setattr(clip, limit, 1)
    result = clip_spectrum(small, 1.0)
    if limit == "_CHUNK_BYTES":
        torch.testing.assert_close(small.weight, plain.weight, rtol=1e-9, atol=1e-12)
    else:  # a coarser grid, which more scaling makes up for
        assert result.bound <= 1
        assert result.distance < 1.1 * expected.distance


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan, "1", True, None])
def test_beta_is_a_finite_number_above_zero(beta: Any) -> None:
    with pytest.raises(ValueError, match="beta="):
        clip_spectrum(nn.Linear(3, 3), beta)


@pytest.mark.parametrize(("name", "value"), [("tol", 0.0), ("tol", math.nan), ("max_iterations", 0)])
def test_arguments_of_the_iteration(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        clip_spectrum(nn.Linear(3, 3), 0.1, **{name: value})


def test_what_cannot_be_clipped() -> None:
    for mode in ("reflect", "replicate"):
        with pytest.raises(ValueError, match=r"'zeros' and 'circular'.*spectral_norm"):
            clip_spectrum(nn.Conv2d(2, 2, 3, padding=1, padding_mode=mode), 1.0, input_size=(8, 8))
    with pytest.raises(ValueError, match="input_size"):
        clip_spectrum(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), 1.0)
    with pytest.raises(ValueError, match="input_size"):
        clip_spectrum(nn.Conv2d(2, 2, 3), 1.0, input_size=(2, 2))  # smaller than the kernel
    with pytest.raises(ValueError, match="remove_spectral_norm"):
        clip_spectrum(spectral_norm(nn.Linear(3, 3)), 1.0)
    with pytest.raises(ValueError, match="no parameter"):
        clip_spectrum(nn.ReLU(), 1.0)
    with pytest.raises(TypeError, match="give a torch"):
        clip_spectrum(torch.ones(2, 2), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lazy"):
        clip_spectrum(nn.LazyConv2d(2, 3), 1.0)
    with pytest.raises(ValueError, match="weight has shape"):
        clip_spectrum(nn.Bilinear(2, 2, 2), 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_left_alone(bad: float) -> None:
    layer = nn.Conv2d(2, 2, 3)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = bad
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="NaN or infinite"):
        clip_spectrum(layer, 0.1)
    assert torch.equal(layer.weight.nan_to_num(), before.nan_to_num())
