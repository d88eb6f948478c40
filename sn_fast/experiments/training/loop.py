"""One network in training, and one epoch of it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from ..data import Samples
from ..networks import demo_network
from .config import TrainConfig
from .errors import Diverged

_MOMENTUM = 0.9


class ProgressBar(Protocol):
    def update(self, n: int) -> Any: ...
    def set_postfix_str(self, text: str, refresh: bool) -> Any: ...


@dataclass
class Trainee:
    """A network, its optimiser, and what each epoch gave."""

    beta: float
    model: nn.Sequential
    optimizer: torch.optim.Optimizer
    epochs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def create(cls, beta: float, image_shape: torch.Size, config: TrainConfig) -> Trainee:
        model = demo_network(image_shape, beta, config.seed).to(config.device)
        return cls(beta, model, torch.optim.SGD(model.parameters(), lr=config.lr, momentum=_MOMENTUM))

    @property
    def name(self) -> str:
        return f"beta={self.beta:g}"

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epochs": self.epochs}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epochs = state["epochs"]

    def train_epoch(self, samples: Samples, config: TrainConfig, epoch: int, bar: ProgressBar) -> dict[str, Any]:
        """One pass over ``samples``, every one attacked; loss and accuracy are those on the attacked samples.

        Raises:
            Diverged: the loss or a weight is not finite.
        """
        start = time.perf_counter()
        adversary = config.training_adversary
        accuracy_name = "accuracy" if config.scheme == "erm" else "adv. acc."
        summed_loss = 0.0
        correct = seen = 0
        self.model.train()
        for x, y in samples.shuffled_batches(config.batch_size, config.seed, epoch):
            # The first use of the weights after the last step refreshes sigma; the step below shares it.
            x_adv = adversary.perturb(self.model, x, y if config.attack_labels == "true" else None)
            logits = self.model(x_adv)
            loss = F.cross_entropy(logits, y)
            value = loss.item()
            if not math.isfinite(value):
                raise Diverged(f"the loss became {value}")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            summed_loss += value * len(y)
            correct += int((logits.argmax(dim=1) == y).sum())
            seen += len(y)
            state = f"loss {summed_loss / seen:.3f}, {accuracy_name} {correct / seen:.1%}"
            bar.set_postfix_str(f"{self.name}: {state}", refresh=False)
            bar.update(1)
        seconds = time.perf_counter() - start
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise Diverged("a weight became infinite or nan")
        return {"epoch": epoch, "loss": summed_loss / seen, "train_accuracy": correct / seen, "seconds": seconds}
