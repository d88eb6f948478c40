"""Eight steps of the published adversarial training through the loop that trains everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sn_fast.experiments import load_published
from sn_fast.experiments.training import TrainConfig
from sn_fast.experiments.training.loop import Trainee
from tests.published import image

# Scheme, beta, eps.
RUNS = {
    "train_clean_erm_beta1.npz": ("erm", 1.0, 1.0),
    "train_clean_fgm_beta1.npz": ("fgm", 1.0, 1.0),
    "train_clean_pgm_beta1.npz": ("pgm", 1.0, 1.0),
    "train_clean_wrm_beta1e+09.npz": ("wrm", 1e9, 0.5),
}


@pytest.mark.parametrize("file", RUNS)
def test_losses_and_accuracies_are_the_published_ones(file: str, published) -> None:
    scheme, beta, eps = RUNS[file]
    inputs, expected = published("train_inputs.npz"), published(file)
    config = TrainConfig.create(
        arch="small_lrn_sn",
        scheme=scheme,
        eps=eps,
        beta=beta,
        single=True,
        gradient="full",
        attack_labels="predicted",
        lr=0.01,
        device="cpu",
    )
    trainee = Trainee.create(beta, (3, 28, 28), 10, config)
    load_published(trainee.model, {name: inputs[name] for name in inputs if name not in ("X", "Y")})
    trainee.model.train()
    steps = [
        trainee.train_step(image(x), torch.from_numpy(y).long(), lr=config.learning_rate(0, i))
        for i, (x, y) in enumerate(zip(inputs["X"], inputs["Y"], strict=True))
    ]
    np.testing.assert_allclose([step.loss for step in steps], expected["loss"], rtol=0, atol=1e-4)
    np.testing.assert_allclose([step.correct / 8 for step in steps], expected["acc"], rtol=0, atol=1e-6)
