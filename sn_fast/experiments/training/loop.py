"""One network in training: a step, an epoch, and what a checkpoint holds of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import SpectralProjection
from ...errors import UserError
from ..data import Samples
from ..data.samples import seed_of
from ..networks import build_network, demo_network, normalized_layers, parameter_groups
from .config import TrainConfig
from .errors import Diverged
from .ranks import ALONE, Ranks
from .reference import published_weight_decay

_MOMENTUM = 0.9


class ProgressBar(Protocol):
    def update(self, n: int) -> Any: ...
    def set_postfix_str(self, text: str, refresh: bool) -> Any: ...


class Step(NamedTuple):
    """What a step of training gave, before it moved the weights."""

    loss: float
    """Mean over the batch, on the attacked samples, with the true labels."""
    correct: int
    """Attacked samples that are classified as their true labels."""


@dataclass
class Trainee:
    """A network, its optimiser, and what each epoch gave."""

    beta: float
    model: nn.Module
    config: TrainConfig
    ranks: Ranks = ALONE
    epochs: list[dict[str, Any]] = field(default_factory=list)
    projection: SpectralProjection | None = None

    def __post_init__(self) -> None:
        self.optimizer = _optimizer(self.model, self.config)
        if self.projection is not None:
            self.projection.attach(self.optimizer)
        self._attacked: nn.Module = torch.compile(self.model) if self.config.compile else self.model  # type: ignore[assignment]
        self._network = self.ranks.wrapped(self._attacked)

    @classmethod
    def create(
        cls,
        beta: float,
        image_shape: Sequence[int],
        num_classes: int,
        config: TrainConfig,
        *,
        device: str | None = None,
        ranks: Ranks = ALONE,
    ) -> Trainee:
        """For images of shape (C, H, W). Equal seeds give equal initial weights for every beta.

        ``device`` replaces that of the configuration.
        """
        channels, size, width = image_shape
        if size != width:
            raise UserError(f"images of {size} x {width} pixels: the networks take square ones")
        layers = {} if config.arch == "demo" else normalized_layers(config.arch)
        projects = config.normalization == "projection" and math.isfinite(beta) and (layers or config.arch == "demo")
        if config.arch == "demo":
            cap = math.inf if projects else beta
            model: nn.Module = demo_network(image_shape, cap, config.seed, num_classes, config.gradient)
        else:
            try:
                model = build_network(
                    config.arch,
                    in_channels=channels,
                    num_classes=num_classes,
                    beta=math.inf if projects else beta,
                    image_size=size,
                    seed=config.seed,
                    spectral_norm={"gradient": config.gradient},
                )
            except ValueError as error:  # images that are too small for it
                raise UserError(f"argument `arch`: {config.arch}: {error}; choose another one") from None
        model = model.to(device or config.device)
        example = torch.zeros(1, *image_shape, device=next(model.parameters()).device)
        projection = SpectralProjection(model, example, beta=beta, **layers) if projects else None
        return cls(beta, model, config, ranks, projection=projection)

    @property
    def name(self) -> str:
        return f"beta={self.beta:g}"

    @property
    def stopped(self) -> bool:
        """Whether it has reached the accuracy at which training ends early."""
        return self.config.stops_after([record["train_accuracy"] for record in self.epochs])

    def state(self) -> dict[str, Any]:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "epochs": self.epochs}
        return state if self.projection is None else {**state, "projection": self.projection.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.projection is not None:
            self.projection.load_state_dict(state["projection"])
        self.epochs = state["epochs"]

    def train_step(self, x: Tensor, y: Tensor, lr: float) -> Step:
        """Attack the samples x, (B, C, H, W), with labels y, (B,), and move the weights against the loss there.

        The batch is that of all processes, each of which computes its part; loss and gradient are those of the whole.

        Raises:
            Diverged: the loss is not finite; the weights are as before.
        """
        config = self.config
        # The first use of the weights after the last step refreshes sigma; the step below shares it.
        samples = len(y)
        x, y = self.ranks.part(x), self.ranks.part(y)
        x_adv = config.training_adversary.perturb(self._attacked, x, y if config.attack_labels == "true" else None)
        with self._autocast(x):
            logits = self._network(x_adv)
            loss = F.cross_entropy(logits, y, reduction="sum") / samples
            # Gradients become means over the processes, so that each counts as many times.
            loss = loss if self.ranks.size == 1 else loss * self.ranks.size
        summed, correct = self.ranks.summed((loss.item(), int((logits.argmax(dim=1) == y).sum())), x.device)
        value = summed / self.ranks.size
        if not math.isfinite(value):
            raise Diverged(f"the loss became {value}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return Step(value, int(correct))

    def train_epoch(self, samples: Samples, epoch: int, bar: ProgressBar) -> dict[str, Any]:
        """One pass over ``samples``, every one attacked; loss and accuracy are those on the attacked samples.

        Raises:
            Diverged: the loss or a weight is not finite.
        """
        start = time.perf_counter()
        config = self.config
        accuracy_name = "accuracy" if config.scheme == "erm" else "adv. acc."
        first_step = (epoch - 1) * config.batches(len(samples))
        summed_loss = 0.0
        correct = seen = 0
        self.model.train()
        batches = samples.shuffled_batches(config.batch_size, config.seed, epoch, drop_last=config.drop_last)
        with self._randomness_of(epoch):
            for i, (x, y) in enumerate(batches):
                step = self.train_step(x, y, config.learning_rate(epoch - 1, first_step + i))
                summed_loss += step.loss * len(y)
                correct += step.correct
                seen += len(y)
                state = f"loss {summed_loss / seen:.3f}, {accuracy_name} {correct / seen:.1%}"
                bar.set_postfix_str(f"{self.name}: {state}", refresh=False)
                bar.update(1)
        seconds = time.perf_counter() - start
        if not all(bool(parameter.isfinite().all()) for parameter in self.model.parameters()):
            raise Diverged("a weight became infinite or nan")
        return {"epoch": epoch, "loss": summed_loss / seen, "train_accuracy": correct / seen, "seconds": seconds}

    @property
    def draws(self) -> bool:
        """Whether its layers draw random numbers (dropout), from the one random state that a process has."""
        return any(isinstance(module, nn.modules.dropout._DropoutNd) for module in self.model.modules())

    @contextmanager
    def _randomness_of(self, epoch: int) -> Iterator[None]:
        """Random numbers that depend on (seed, epoch, rank) alone, as the samples' order does on the first two."""
        if not self.draws:
            yield
            return
        device = next(self.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else ()):
            torch.manual_seed(seed_of(self.config.seed, epoch, self.ranks.rank))
            yield

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        dtype = self.config.autocast_dtype
        return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype)


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    groups = parameter_groups(model) if config.weight_decay is None else _decayed(model, config.weight_decay)
    for group in groups:
        if config.reference:
            group["weight_decay"] = published_weight_decay(group["weight_decay"], config.scheme)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=_MOMENTUM)


def _decayed(model: nn.Module, factor: float) -> list[dict[str, Any]]:
    """Weight decay of all weights, not of biases and scales."""
    weights, others = ([p for p in model.parameters() if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    groups = {factor: weights, 0.0: others} if factor else {0.0: [*weights, *others]}
    return [{"params": parameters, "weight_decay": f} for f, parameters in groups.items() if parameters]
