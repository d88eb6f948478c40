"""Images, what an attack adds to them, and what networks see in the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ...errors import OptionError
from .. import figures
from ..data import Samples
from ..networks import evaluating
from ..training.adversary import Adversary
from ..training.config import ATTACK_LABELS
from .results import Analysis, Row, check_samples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL_INCHES = 1.15
_GREY = "0.5"


@dataclass(frozen=True)
class AttackedImage:
    """One image against one network.

    Attributes:
        index: of the image among the samples.
        label: its true class.
        clean, attacked: classes that the network predicts before and after; ``clean_confidence`` and
            ``attacked_confidence`` are the probabilities that it gives them.
        l2, linf: length of the perturbation, in units of the input.
        image, perturbation: (C, H, W), in units of the input.
    """

    index: int
    label: int
    clean: int
    clean_confidence: float
    attacked: int
    attacked_confidence: float
    l2: float
    linf: float
    image: np.ndarray
    perturbation: np.ndarray


@dataclass(frozen=True)
class PerturbedImages(Analysis):
    """Attacked images; see ``perturbed_images``.

    Attributes:
        networks: {name: its images}, the same images for each.
        magnify: factor of the perturbations in the figure.
    """

    networks: dict[str, tuple[AttackedImage, ...]]
    attack: str
    magnify: float

    columns = (
        *("network", "image", "label", "clean prediction", "clean confidence", "attacked prediction"),
        *("attacked confidence", "l2", "linf"),
    )

    def rows(self) -> list[Row]:
        """One per network and image; without the pixels."""
        return [
            (n, i.index, i.label, i.clean, i.clean_confidence, i.attacked, i.attacked_confidence, i.l2, i.linf)
            for n, images in self.networks.items()
            for i in images
        ]

    def _draw(self) -> Figure:
        first = next(iter(self.networks.values()))
        lines = 1 + 2 * len(self.networks)
        figure = figures.new_figure(max(4.8, 1.4 + _CELL_INCHES * len(first)), 0.8 + (_CELL_INCHES + 0.22) * lines)
        grid = figure.subplots(lines, len(first), squeeze=False)
        for column, image in enumerate(first):
            _show(grid[0, column], _displayed(image.image, image.image), f"label {image.label}")
        _name(grid[0, 0], "original")
        for n, (name, images) in enumerate(self.networks.items()):
            noise, result = grid[1 + 2 * n], grid[2 + 2 * n]
            for column, image in enumerate(images):
                _show(noise[column], _magnified(image, self.magnify), f"‖δ‖₂ = {image.l2:.2g}")
                caption = f"{image.clean} → {image.attacked} ({image.attacked_confidence:.0%})"
                wrong = image.attacked != image.label
                _show(result[column], _displayed(image.image + image.perturbation, image.image), caption, wrong)
            _name(noise[0], f"{name}:\nperturbation\n× {self.magnify:.3g}")
            _name(result[0], f"{name}:\nattacked")
        figures.titled(
            figure,
            f"{self.attack}: prediction before → after (its probability); framed where it is wrong after",
        )
        return figure


def perturbed_images(
    networks: Mapping[str, nn.Module],
    samples: Samples,
    adversary: Adversary,
    *,
    indices: Sequence[int] = tuple(range(8)),
    labels: str = "true",
    magnify: float | None = None,
) -> PerturbedImages:
    """Attack some images against each network.

    Args:
        networks: {name: network}.
        samples: images, of which those at ``indices`` are taken.
        labels: what the attack moves away from: "true" or "predicted" labels.
        magnify: factor of the perturbations in the figure, whose grey is no change. None: such that the largest
            change of a pixel takes the full range.

    Raises:
        OptionError: an argument is empty or out of range.
    """
    if not networks:
        raise OptionError("networks", dict(networks), "give at least one")
    check_samples(samples)
    chosen = list(indices)
    if not chosen or not all(0 <= index < len(samples) for index in chosen):
        raise OptionError("indices", chosen, f"give some of 0 to {len(samples) - 1}")
    if labels not in ATTACK_LABELS:
        raise OptionError("labels", labels, f"choose {' or '.join(ATTACK_LABELS)}")
    if magnify is not None and not 0 < magnify < float("inf"):
        raise OptionError("magnify", magnify, "must be a finite number > 0")
    x, y = samples.x[chosen], samples.y[chosen]
    found = {name: _attacked(model, x, y, chosen, adversary, labels) for name, model in networks.items()}
    largest = max(image.linf for images in found.values() for image in images)
    return PerturbedImages(found, str(adversary), magnify or (_range(x) / (2 * largest) if largest else 1.0))


def _attacked(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, indices: Sequence[int], adversary: Adversary, labels: str
) -> tuple[AttackedImage, ...]:
    with torch.no_grad(), evaluating(model):
        moved = adversary.perturb(model, x, y if labels == "true" else None)
        before, after = model(x).softmax(dim=1), model(moved).softmax(dim=1)
    delta = moved - x
    flat = delta.flatten(1)
    return tuple(
        AttackedImage(
            index=index,
            label=int(y[i]),
            clean=int(before[i].argmax()),
            clean_confidence=float(before[i].max()),
            attacked=int(after[i].argmax()),
            attacked_confidence=float(after[i].max()),
            l2=float(flat[i].norm()),
            linf=float(flat[i].abs().max()),
            image=x[i].numpy(force=True),
            perturbation=delta[i].numpy(force=True),
        )
        for i, index in enumerate(indices)
    )


def _range(x: torch.Tensor) -> float:
    """Of the pixels on display: 1 where they are in [0, 1], else that of the images."""
    low, high = float(x.min()), float(x.max())
    return 1.0 if low >= 0 and high <= 1 else (high - low) or 1.0


def _limits(image: np.ndarray) -> tuple[float, float]:
    low, high = float(image.min()), float(image.max())
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return low, high if high > low else low + 1.0


def _displayed(image: np.ndarray, original: np.ndarray) -> np.ndarray:
    """In [0, 1]; whitened images over the range that the original has."""
    low, high = _limits(original)
    return _pixels((image - low) / (high - low))


def _magnified(image: AttackedImage, factor: float) -> np.ndarray:
    low, high = _limits(image.image)
    return _pixels(0.5 + factor * image.perturbation / (high - low))


def _pixels(image: np.ndarray) -> np.ndarray:
    """(H, W, 3), or (H, W) of images with another number of channels: their mean."""
    clipped = np.clip(image, 0, 1)
    return clipped.transpose(1, 2, 0) if len(clipped) == 3 else clipped.mean(axis=0)


def _show(axes: Axes, pixels: np.ndarray, caption: str, wrong: bool = False) -> None:
    grey: dict[str, Any] = {} if pixels.ndim == 3 else {"cmap": "gray", "vmin": 0, "vmax": 1}
    axes.imshow(pixels, interpolation="nearest", **grey)
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=figures.COLOURS[0] if wrong else _GREY, linewidth=2.5 if wrong else 0.5)
    axes.set_title(caption, fontsize=9, fontweight="bold" if wrong else "normal", pad=3)


def _name(axes: Axes, text: str) -> None:
    axes.set_ylabel(text, rotation=0, ha="right", va="center")
