"""A normalised model in eval mode exports to ONNX as the plain model with the normalised weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sn_fast import update_spectral_norm

from .models import X, normalised

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime, onnx and onnxscript are not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cap", "scale"])
def test_the_exported_model_computes_the_same(mode: str, tmp_path: Path) -> None:
    model = normalised(beta=0.4, mode=mode).eval()
    for p in model.parameters():
        p.data.mul_(1.5)
    update_spectral_norm(model, 5)
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (X,), str(file), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(out), model(X).detach(), rtol=1e-4, atol=1e-5)
