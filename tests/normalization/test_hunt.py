"""Writes to a part of a weight, roundings of its dtype: sigma stays that of the weight in use."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time

import pytest
import torch
from torch import Tensor, nn

from sn_fast import sigmas, spectral_norm
from sn_fast.ops.fingerprint import is_hashed, is_replaced, record_of
from sn_fast.ops.refresh import LOCK

from ..on_device import DEVICE


def norm_of(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double(), 2))


def _one_place(w: Tensor, big: float) -> None:
    w[5, 7] = big


def _one_row(w: Tensor, big: float) -> None:
    w[3] = big * torch.randn(w[3].shape) / w[3].numel() ** 0.5


def _one_column(w: Tensor, big: float) -> None:
    w[:, 7] = big * torch.randn(w[:, 7].shape) / w[:, 7].numel() ** 0.5


def _all_but_the_first_column(w: Tensor, big: float) -> None:
    w[:, 1:] = torch.randn(w[:, 1:].shape[0], 1) * torch.randn(w[:, 1:].shape)


@pytest.mark.parametrize("write", [_one_place, _one_row, _one_column, _all_but_the_first_column])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_large_write_to_a_part_of_the_weight_is_followed(write, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(512, 512, bias=False).to(dtype))
    raw = layer.parametrizations.weight.original
    with torch.no_grad():
        write(raw, 30.0)
    found = sigmas(layer)[""]
    assert found == pytest.approx(norm_of(raw), rel=0.02)
    assert norm_of(layer.weight) <= 1.02


@pytest.mark.parametrize("gain", [1.0, 1e-25, 1e25])
def test_a_kernel_moved_to_one_tap_is_followed(gain: float) -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Conv2d(64, 64, 3, padding=1), input_size=4)
    raw = layer.parametrizations.weight.original
    with torch.no_grad():
        raw.mul_(gain)
    sigmas(layer)
    left, right = torch.linalg.qr(torch.randn(64, 64))[0], torch.linalg.qr(torch.randn(64, 64))[0]
    with torch.no_grad():
        raw.zero_()
        raw[:, :, 1, 1] = gain * left @ torch.diag(torch.linspace(3, 0.1, 64) ** 3) @ right
    assert sigmas(layer)[""] == pytest.approx(27 * gain, rel=0.01)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("shape", [(1024, 1024), (64, 64, 3, 3), (96, 48, 5)])
def test_the_sample_does_not_lie_in_one_column_or_tap(shape: tuple[int, ...], hashed: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    record = record_of(weight, hashed=hashed)
    for last in range(0, shape[-1], max(1, shape[-1] // 4)):
        other = torch.randn(shape)
        other[..., last] = weight[..., last]
        assert is_replaced(other, record)


def test_a_nan_that_no_sample_meets_leaves_no_trace() -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(64, 64))
    raw = layer.parametrizations.weight.original
    kept = raw.detach().clone()
    with torch.no_grad():
        raw[0, 1] = float("nan")
    sigmas(layer)
    with torch.no_grad():
        raw.copy_(kept)
    assert sigmas(layer)[""] == pytest.approx(norm_of(raw), rel=0.01)


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize(("start", "dtype"), [("float32", "bfloat16"), ("float32", "float16"), ("float64", "float32")])
def test_a_bound_holds_for_the_weight_that_a_change_of_dtype_has_rounded(start: str, dtype: str, hashed: bool) -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        kind = nn.Linear(6, 5) if seed % 2 else nn.Conv2d(2, 3, 1)
        size = None if seed % 2 else 4
        layer = spectral_norm(kind.to(getattr(torch, start)), bound=True, input_size=size)
        own = layer.parametrizations.weight[0]
        if hashed:
            own.hashed = True
            own.record = record_of(own.operand(own.raw), hashed=True)
        layer = copy.deepcopy(layer).to(getattr(torch, dtype))
        raw = layer.parametrizations.weight.original
        assert norm_of(raw.flatten(1)) <= sigmas(layer)[""]
        assert norm_of(layer.weight.flatten(1)) <= 1


@pytest.mark.skipif(not hasattr(os, "fork") or DEVICE.type != "cpu", reason="processes do not fork here, or not CUDA's")
def test_a_process_forked_while_a_thread_refreshes_can_use_the_model() -> None:
    layer, x = spectral_norm(nn.Linear(8, 8)), torch.randn(2, 8)
    held = threading.Event()

    def refresh_slowly() -> None:
        with LOCK:
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=refresh_slowly)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        try:
            with torch.no_grad():
                layer.parametrizations.weight.original.mul_(3)
                layer(x)
            os._exit(0)
        finally:
            os._exit(1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv", "reshape", "bound"])
def test_a_weight_of_another_shape_starts_anew(kind: str, full: bool) -> None:
    torch.manual_seed(0)
    options: dict = {"gradient": "full"} if full and kind != "bound" else {}
    if kind in ("conv", "reshape"):
        layer: nn.Module = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        options |= {"input_size": 5} if kind == "conv" else {"operator": "reshape"}
        wider, x = torch.randn(6, 3, 3, 3), torch.randn(1, 3, 5, 5)
    else:
        layer = nn.Embedding(4, 8) if kind == "embedding" else nn.Linear(8, 4, bias=False)
        options |= {"bound": True} if kind == "bound" else {}
        wider, x = torch.randn(6, 8), torch.zeros(2, dtype=torch.long) if kind == "embedding" else torch.randn(2, 8)
    spectral_norm(layer, mode="scale", **options)
    layer(x)
    layer.parametrizations.weight.original = nn.Parameter(4 * wider)
    if kind == "conv":
        eye = torch.eye(75, dtype=torch.double).reshape(75, 3, 5, 5)
        truth = norm_of(nn.functional.conv2d(eye, 4 * wider.double(), padding=1).flatten(1))
    else:
        truth = norm_of(4 * wider.flatten(1))
    assert sigmas(layer)[""] == pytest.approx(truth, rel=0.01)
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original.grad.shape == wider.shape
    torch.testing.assert_close(layer.weight.detach(), 4 * wider / truth, rtol=0.01, atol=1e-6)
    twin = copy.deepcopy(layer)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin.weight, layer.weight)


@pytest.mark.parametrize("hashed", [False, True])
def test_a_weight_with_a_lazy_minus(hashed: bool) -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(40, 40), mode="scale")
    layer.parametrizations.weight[0].hashed = hashed
    raw = nn.Parameter(torch.randn(40, 40, dtype=torch.cfloat).conj().imag)
    assert raw.is_neg()
    layer.parametrizations.weight.original = raw
    assert norm_of(layer.weight.resolve_neg()) == pytest.approx(1, abs=0.01)
    for _ in range(2):
        with torch.no_grad():
            raw[:, 3] = 30.0
        assert norm_of(layer.weight.resolve_neg()) == pytest.approx(1, abs=0.01)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="about the host's two kinds of records")
@pytest.mark.parametrize("hashed", [False, True])
def test_a_replaced_weight_after_a_move_between_kinds_of_records(hashed: bool) -> None:
    torch.manual_seed(0)
    layer = spectral_norm(nn.Linear(64, 64), mode="scale")
    own, raw = layer.parametrizations.weight[0], layer.parametrizations.weight.original
    own.record = record_of(raw, hashed=not hashed)  # as a GPU leaves it to the CPU, or the other way about
    own.hashed = hashed
    with torch.no_grad():
        raw.copy_(torch.randn(64, 64))
    assert norm_of(layer.weight) == pytest.approx(1, abs=0.01)
    assert is_hashed(own.record) == hashed
