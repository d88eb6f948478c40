"""Eight steps of the published adversarial training, loss by loss and weight by weight (SGD with momentum, float32)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sn_fast import apply_spectral_norm, update_spectral_norm
from sn_fast.attacks import fgm, pgd, wrm
from tests.published import image, kernel, matrix

LAYERS = ("conv1", "conv2", "conv3", "fc")
ATTACKS = {
    "erm": lambda model, x: x,
    "fgm": lambda model, x: fgm(model, x, norm=2, eps=1.0),
    "pgm": lambda model, x: pgd(model, x, norm=2, eps=1.0, steps=15),
    "wrm": lambda model, x: wrm(model, x, eps=0.5, steps=15),
}
RUNS = {"erm": ("beta1", 1.0), "fgm": ("beta1", 1.0), "pgm": ("beta1", 1.0), "wrm": ("beta1e+09", 1e9)}


class PublishedNet(nn.Module):
    """The network of the ``train_clean_*`` files: conv, ReLU, pool, LRN, strided conv, ELU, conv, ELU, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 5, padding=2)
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(200, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 3, 2)
        x = F.local_response_norm(x, 9, alpha=0.001, beta=0.75, k=1.0)
        x = F.elu(self.conv3(F.elu(self.conv2(x))))
        return self.fc(x.permute(0, 2, 3, 1).flatten(1))


def as_ours(name: str, a: np.ndarray) -> Tensor:
    """A published parameter in PyTorch's layout."""
    if name.endswith("bias"):
        return torch.from_numpy(a)
    return matrix(a) if name.startswith("fc") else kernel(a)


@pytest.mark.parametrize("scheme", RUNS)
def test_eight_steps(scheme: str, published) -> None:
    suffix, beta = RUNS[scheme]
    inputs, expected = published("train_inputs.npz"), published(f"train_clean_{scheme}_{suffix}.npz")
    model = PublishedNet()
    with torch.no_grad():
        for layer in LAYERS:
            getattr(model, layer).weight.copy_(as_ours(layer, inputs[f"{layer}.weights"]))
            getattr(model, layer).bias.copy_(torch.from_numpy(inputs[f"{layer}.bias"]))
    apply_spectral_norm(model, torch.zeros(1, 3, 28, 28), beta=beta, gradient="full")
    states = {layer: getattr(model, layer).parametrizations.weight[0] for layer in LAYERS}
    for layer, state in states.items():
        u = inputs[f"{layer}.weights_SN.u"]
        if layer == "fc":
            state.u.copy_(torch.from_numpy(u[0]))
        else:
            state.v.copy_(image(u)[0])
    update_spectral_norm(model)
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
                theirs = as_ours(layer, expected[f"w_step{i}.{layer}.weights"])
                torch.testing.assert_close(raw, theirs, rtol=0, atol=1e-5)
        losses.append(float(loss.detach()))
        accuracies.append(float((logits.argmax(1) == y).float().mean()))
    np.testing.assert_allclose(losses, expected["loss"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(accuracies, expected["acc"], rtol=0, atol=1e-6)
