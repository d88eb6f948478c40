"""cap_singular_values: all singular values of matrices clipped, compared with a dense SVD in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sn_fast import SpectralProjection
from sn_fast.reference.clip import clip_singular_values


def truth(weight: Tensor, beta: float) -> Tensor:
    u, s, v = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    return (u * s.clamp(max=beta)) @ v


def with_spectrum(m: int, n: int, s: Tensor) -> Tensor:
    u, v = (torch.linalg.qr(torch.randn(k, len(s), dtype=torch.float64))[0] for k in (m, n))
    return ((u * s) @ v.T).float()


SPECTRA = {
    "spread": torch.linspace(0.02, 9, 24),
    "rank 5": torch.linspace(1, 6, 5),
    "rank 1": torch.tensor([14.0]),
    "at beta": torch.linspace(0.98, 1.02, 24),
    "all equal": torch.full((24,), 3.0),
    "tiny beside large": torch.logspace(-9, 1, 24),
    "within": torch.linspace(0.1, 0.6, 24),
    "far above": torch.linspace(0.5, 900, 24),
}


@pytest.mark.parametrize("shape", [(24, 24), (60, 24), (24, 60)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_spectrum_is_that_of_a_dense_svd(spectrum: str, shape: tuple[int, int]) -> None:
    weight = with_spectrum(*shape, SPECTRA[spectrum].double())
    clipped = clip_singular_values(weight, 1.0)
    assert torch.linalg.matrix_norm(clipped - truth(weight, 1.0), 2) < 1e-3
    assert torch.equal(clip_singular_values(weight, 1.0, passes=3), clipped) or spectrum not in ("far above", "within")
    if spectrum == "within":
        assert torch.equal(clipped, weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight = with_spectrum(40, 24, SPECTRA["spread"].double()).to(dtype)
    clipped = clip_singular_values(weight, 1.0)
    assert clipped.dtype == dtype
    rounded = truth(weight, 1.0).to(dtype).double()
    torch.testing.assert_close(clipped.double(), rounded, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (60, 24), (24, 60)], ids=["square", "tall", "wide"])
def test_autocast_changes_no_bit(shape: tuple[int, int]) -> None:
    weight = with_spectrum(*shape, SPECTRA["spread"].double())
    layer = nn.Linear(*reversed(shape))
    layer.weight = nn.Parameter(weight.clone())
    with torch.autocast("cpu", torch.bfloat16):
        clipped = clip_singular_values(weight, 1.0)
        SpectralProjection(nn.Sequential(layer), torch.zeros(1, shape[1]), cap_singular_values=True)
    assert torch.equal(clipped, clip_singular_values(weight, 1.0))
    assert torch.linalg.matrix_norm(layer.weight - truth(weight, 1.0), 2) < 1e-3


def test_no_decomposition_runs_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, wanted = torch.randn(8, 8), None
    wanted = clip_singular_values(weight, 1.0)
    for name in ("svd", "eigh", "svdvals", "qr", "inv", "solve", "cholesky"):
        monkeypatch.setattr(torch.linalg, name, lambda *_, **__: pytest.fail("a decomposition"))
    assert torch.equal(clip_singular_values(weight, 1.0), wanted)
    compiled = torch.compile(lambda w, beta: clip_singular_values(w, beta, 1), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weight, 1.0), wanted)


def test_weights_that_are_not_finite_stay() -> None:
    weight = 9 * torch.randn(5, 5)
    weight[0, 0] = torch.nan
    torch.testing.assert_close(clip_singular_values(weight, 1.0), weight, equal_nan=True, rtol=0, atol=0)
    assert not clip_singular_values(torch.zeros(4, 6), 1.0).any()


def test_the_projection_clips_matrices_and_scales_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 2, stride=2),  # patches: a matrix
        nn.ConvTranspose2d(6, 4, 2, stride=2),  # likewise
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Flatten(),
        nn.Linear(4 * 64, 20),
        nn.Linear(20, 20, dtype=torch.float32),
    )
    with torch.no_grad():
        for p in model.parameters():
            p *= 5
    raw = [p.detach().clone() for p in model.parameters()]
    projection = SpectralProjection(model, torch.zeros(1, 3, 8, 8), beta=0.8, cap_singular_values=True)
    patches, transposed, conv, _, first, second = model
    for layer, before in ((patches, raw[0]), (transposed, raw[2]), (first, raw[6]), (second, raw[8])):
        found, wanted = layer.weight.flatten(1), truth(before.flatten(1), 0.8)
        assert torch.linalg.matrix_norm(found - wanted, 2) < 1e-3
    factor = (conv.weight / raw[4]).detach()
    torch.testing.assert_close(factor, factor[0, 0, 0, 0].expand_as(factor), rtol=1e-5, atol=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    projection.attach(optimizer)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    before = first.weight.detach() - 0.3 * first.weight.grad
    optimizer.step()
    assert torch.linalg.matrix_norm(before, 2) > 0.9
    assert torch.linalg.matrix_norm(first.weight - truth(before, 0.8), 2) < 1e-3
