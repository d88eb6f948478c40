"""Networks that ``sn-fast train`` has left, as models of the other commands."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..errors import UserError
from ..experiments.training import TrainConfig, trained_networks
from .parser import renamed

CHECKPOINT = "checkpoint.pt"


class RunNetwork(NamedTuple):
    """One network of a run's folder."""

    title: str
    module: nn.Module
    input_size: tuple[int, ...]
    config: TrainConfig


def run_folder(text: str | Path) -> Path | None:
    """The folder of a run, if ``text`` is one or the checkpoint in one; None where it is anything else."""
    path = Path(text)
    folder = path.parent if path.name == CHECKPOINT else path
    try:
        return folder if (folder / CHECKPOINT).is_file() and (folder / "config.json").is_file() else None
    except (OSError, ValueError):  # no file can have such a name
        return None


def load_run(folder: Path, network: str | None) -> RunNetwork:
    """The network of this name, e.g. "beta=inf"; None: the last one, which is the normalised one where there are two.

    Raises:
        UserError: the run is damaged, or has no such network.
    """
    try:
        networks = trained_networks(folder)
    except UserError as error:
        raise UserError(renamed(str(error), {"path": "MODEL"})) from None
    name = next(reversed(networks)) if network is None else network
    if name not in networks:
        raise UserError(f"argument --network: {folder} has no {name}; choose {' or '.join(networks)}")
    found = networks[name]
    return RunNetwork(f"{folder}, {name}", found.model, found.image_shape, found.config)
