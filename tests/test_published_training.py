"""Eight steps of the published adversarial training, loss by loss and weight by weight (SGD with momentum, float32)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sn_fast.attacks import fgm, pgd, wrm
from sn_fast.experiments import build_network, load_published
from tests.published import image, kernel, matrix

LAYERS = ("conv1", "conv2", "conv3", "fc")
ATTACKS = {
    "erm": lambda model, x: x,
    "fgm": lambda model, x: fgm(model, x, norm=2, eps=1.0),
    "pgm": lambda model, x: pgd(model, x, norm=2, eps=1.0, steps=15),
    "wrm": lambda model, x: wrm(model, x, eps=0.5, steps=15),
}
RUNS = {"erm": ("beta1", 1.0), "fgm": ("beta1", 1.0), "pgm": ("beta1", 1.0), "wrm": ("beta1e+09", 1e9)}


@pytest.mark.parametrize("scheme", RUNS)
def test_eight_steps(scheme: str, published) -> None:
    suffix, beta = RUNS[scheme]
    inputs, expected = published("train_inputs.npz"), published(f"train_clean_{scheme}_{suffix}.npz")
    model = build_network("small_lrn_sn", in_channels=3, beta=beta, spectral_norm={"gradient": "full"})
    load_published(model, {name: a for name, a in inputs.items() if "." in name})
    states = {layer: model.get_submodule(layer).parametrizations.weight[0] for layer in LAYERS}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses, accuracies = [], []
    for i, (x, y) in enumerate(zip(inputs["X"], inputs["Y"], strict=True), start=1):
        x, y = image(x), torch.from_numpy(y)
        x = ATTACKS[scheme](model, x)
        optimizer.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        for layer, state in states.items():
            if f"u_step{i}.{layer}.weights_SN.u" in expected:
                u = expected[f"u_step{i}.{layer}.weights_SN.u"]
                ours, theirs = (state.u, torch.from_numpy(u[0])) if layer == "fc" else (state.v, image(u)[0])
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if i == 1 else 1e-4)
        optimizer.step()
        for layer in LAYERS:
            if f"w_step{i}.{layer}.weights" in expected:
                raw = getattr(model, layer).parametrizations.weight.original.detach()
                theirs = (matrix if layer == "fc" else kernel)(expected[f"w_step{i}.{layer}.weights"])
                torch.testing.assert_close(raw, theirs, rtol=0, atol=1e-5)
        losses.append(float(loss.detach()))
        accuracies.append(float((logits.argmax(1) == y).float().mean()))
    np.testing.assert_allclose(losses, expected["loss"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(accuracies, expected["acc"], rtol=0, atol=1e-6)
