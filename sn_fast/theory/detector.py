"""A detector of attacked inputs that looks at how layers amplify a small perturbation, and an attack that knows it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks import fgm, pgd
from ..attacks.arguments import check_count, check_samples
from ..attacks.gradient import guarded
from ..attacks.task import Loss
from ..errors import require
from .amplification import check_model, doubled_pass, log_gains
from .gradients import sample_norms
from .margins import margins
from .schemes import positive

_BATCH_SIZE = 256


class AmplificationDetector:
    """Logistic regression on the gains that a network's layers show for a small perturbation of its input.

    Attacked inputs lie where a network reacts otherwise than at natural ones; how much it amplifies a perturbation,
    layer by layer, shows some of that. The perturbation is made from what is there at test time: the input and the
    network, never the true label or the attack. Of each linear layer there are two signals, the logarithms of its gain
    and of the cumulative gain up to it (``Amplification``).

    It is no defence: ``attack`` finds inputs that fool the network and the detector at once.

    >>> detector = AmplificationDetector(model, length=0.05).fit(x, pgd(model, x, y, eps=1.0))
    >>> detector.auroc(x_test, pgd(model, x_test, y_test, eps=1.0))

    Args:
        model: a classifier of linear layers that keeps the batch in the first dimension; left as it is.
        length: l2 length of the perturbation, in the units of x. Short ones, about 1 % of ||x||, tell most.
        direction: "gradient", along the loss gradient at the network's own prediction (one more forward and backward);
            or "noise", ``repeats`` fixed random directions, the same for every sample, over which the logarithms are
            averaged.
        repeats, seed: of "noise".
        loss: of "gradient", "ce" or "bce"; as in ``sn_fast.attacks.pgd``.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        length: float,
        direction: str = "gradient",
        repeats: int = 4,
        seed: int = 0,
        loss: Literal["ce", "bce"] | Loss = "ce",
    ) -> None:
        self.model = check_model(model)
        self.length = positive("length", length)
        if direction not in ("gradient", "noise"):
            raise ValueError(f'direction={direction!r} is unknown; choose "gradient" or "noise"')
        self.direction = direction
        self.repeats = check_count("repeats", repeats)
        self.seed = seed
        self.loss = loss
        self._line: tuple[Tensor, Tensor] | None = None  # weights and offset of the log-odds

    def signals(self, x: Tensor) -> Tensor:
        """(N, 2 * layers): logarithms of the layers' gains, then of the cumulative gains."""
        with guarded(self.model, "eval", True, False):
            return torch.cat([self._signals(part)[0] for part in _batches(x)])

    def fit(self, clean: Tensor, attacked: Tensor) -> AmplificationDetector:
        """Learn to tell ``clean`` (N, *size) from ``attacked`` (M, *size).

        Raises:
            UserError: scikit-learn is not installed. ValueError: a sample's activations are not finite.
        """
        linear_model = require("sklearn.linear_model")
        signals = [self.signals(clean), self.signals(attacked)]
        for name, part in zip(("clean", "attacked"), signals):
            if not bool(part.isfinite().all()):
                raise ValueError(
                    f"{name} has samples at which activations of the network are not finite; leave them out"
                )
        data = torch.cat(signals).double()
        spread, mean = data.std(dim=0, correction=0), data.mean(dim=0)
        spread = torch.where(spread > 1e-12, spread, 1.0)
        labels = [0] * len(clean) + [1] * len(attacked)
        found = linear_model.LogisticRegression(max_iter=1000).fit(((data - mean) / spread).numpy(force=True), labels)
        weights = torch.from_numpy(found.coef_[0]).to(data) / spread
        offset = float(found.intercept_[0]) - (weights * mean).sum()
        self._line = weights.to(signals[0]), offset.to(signals[0])
        return self

    def score(self, x: Tensor) -> Tensor:
        """(N,): log-odds that a sample was attacked, at the shares of the samples in ``fit``.

        Raises:
            RuntimeError: the detector has not been fitted.
        """
        return self._scores(self.signals(x))

    def auroc(self, clean: Tensor, attacked: Tensor) -> float:
        """Area under the ROC curve: the probability that an attacked sample scores above a clean one; 0.5 is chance."""
        metrics = require("sklearn.metrics")
        scores = torch.cat((self.score(clean), self.score(attacked))).double().numpy(force=True)
        return float(metrics.roc_auc_score([0] * len(clean) + [1] * len(attacked), scores))

    def attack(
        self, x: Tensor, y: Tensor, *, eps: float, steps: int = 40, weight: float = 1.0, **settings: Any
    ) -> Tensor:
        """PGM against the network and this detector at once.

        After ``steps`` against the network alone, as many climb -softplus(margin) - weight * softplus(score) through
        the signals, with the direction of the perturbation held fixed in each step; the best iterate is kept.

        Args:
            x, y: samples (N, *size) and their true classes (N,).
            weight: of the detector's score against the margin.
            eps, steps, settings: of ``sn_fast.attacks.pgd``; also its norm, alpha and clip.

        Returns:
            x_adv, of the shape of x.

        Raises:
            RuntimeError: the detector has not been fitted. ValueError, TypeError: as ``pgd`` does.
        """
        weight = positive("weight", weight, zero=True)
        self._fitted()

        def lead(logits: Tensor, labels: Tensor) -> Tensor:
            return -F.softplus(margins(logits, labels))

        def loss(outputs: Tensor, labels: Tensor) -> Tensor:
            return lead(outputs[:, :-1], labels) - weight * F.softplus(outputs[:, -1])

        watched, found = _Watched(self), []
        for a, b in zip(_batches(x), y.split(_BATCH_SIZE)):
            start = pgd(self.model, a, b, eps=eps, steps=steps, loss=lead, **settings)
            options = {**settings, "x_init": start, "keep_best": True}
            found.append(pgd(watched, a, b, eps=eps, steps=steps, loss=loss, **options))
        return torch.cat(found)

    def _scores(self, signals: Tensor) -> Tensor:
        weights, offset = self._fitted()
        return signals @ weights + offset

    def _fitted(self) -> tuple[Tensor, Tensor]:
        if self._line is None:
            raise RuntimeError("the detector has not been fitted: call fit(clean, attacked) first")
        return self._line

    def _signals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Signals and logits, differentiable in x where autograd is on."""
        found, logits = [], x
        for delta in self._perturbations(x):
            gains = doubled_pass(self.model, x, delta)
            found.append(torch.cat((log_gains(gains.gain), log_gains(gains.cumulative)), dim=1))
            logits = gains.logits
        return torch.stack(found).mean(dim=0), logits

    def _perturbations(self, x: Tensor) -> Iterator[Tensor]:
        if self.direction == "gradient":
            x = x.detach()
            yield fgm(self.model, x, norm=2, eps=self.length, loss=self.loss) - x
            return
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.repeats):
            noise = torch.randn(1, *x.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
            yield (noise * (self.length / sample_norms(noise))).to(x).expand_as(x)


class _Watched(nn.Module):
    """The network, with the detector's score as one more logit."""

    def __init__(self, detector: AmplificationDetector) -> None:
        super().__init__()
        self.model = detector.model
        self._detector = detector

    def forward(self, x: Tensor) -> Tensor:
        signals, logits = self._detector._signals(x)
        return torch.cat((logits, self._detector._scores(signals)[:, None]), dim=1)


def _batches(x: Tensor) -> tuple[Tensor, ...]:
    check_samples(x)
    if not len(x):
        raise ValueError("x has no samples")
    return x.split(_BATCH_SIZE)
