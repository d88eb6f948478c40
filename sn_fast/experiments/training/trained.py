"""The networks that a run has trained."""

from __future__ import annotations

import os
from typing import NamedTuple

from torch import nn

from ...errors import UserError
from .config import TrainConfig
from .job import config_of
from .loop import Trainee
from .run_folder import RunFolder


class TrainedNetwork(NamedTuple):
    """A network as the last epoch of a run left it."""

    config: TrainConfig
    beta: float
    image_shape: tuple[int, int, int]
    num_classes: int
    model: nn.Module
    """In evaluation mode, on the CPU."""


def trained_networks(path: str | os.PathLike[str]) -> dict[str, TrainedNetwork]:
    """The networks in the folder of a run of ``train``, finished or not, by name: "beta=inf", "beta=2".

    Raises:
        UserError: the folder holds no run, or a damaged one.
    """
    folder = RunFolder.existing(path)
    if not folder.has_checkpoint():
        raise UserError(f"argument `path`: {path} has no checkpoint.pt yet")
    state = folder.read_checkpoint()
    config = config_of(folder, state)
    try:
        image_shape = tuple(state["image_shape"])
        num_classes = state["num_classes"]
    except KeyError:
        raise UserError(
            f"argument `path`: {path} was trained by an earlier version, which did not write the shape of the images"
        ) from None
    networks = {}
    for beta in config.betas:
        trainee = Trainee.create(beta, image_shape, num_classes, config, device="cpu")
        try:
            trainee.load(state["networks"][trainee.name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"argument `path`: the checkpoint in {path} is not of these networks ({reason})") from None
        model = trainee.model.eval()
        networks[trainee.name] = TrainedNetwork(config, beta, image_shape, num_classes, model)
    return networks
