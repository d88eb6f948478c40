"""Scalars of a run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import require


class Scalars:
    """Loss, accuracies and layer norms per epoch, in ``folder``/tensorboard, one TensorBoard run for each network."""

    def __init__(self, folder: Path, enabled: bool, first_epoch: int) -> None:
        """``first_epoch``: what an earlier process wrote from this epoch on is discarded (the epoch is done again)."""
        self._folder = folder / "tensorboard"
        self._enabled = enabled
        self._first = first_epoch
        self._writers: dict[str, Any] = {}
        if enabled:
            require("tensorboard", "tensorboard")

    def write(self, network: str, record: Mapping[str, Any]) -> None:
        """The record of one epoch."""
        if not self._enabled:
            return
        writer = self._writers.get(network)
        if writer is None:
            make = require("torch.utils.tensorboard").SummaryWriter
            writer = self._writers[network] = make(str(self._folder / network), purge_step=self._first)
        epoch = record["epoch"]
        for key, name in (
            ("loss", "loss"),
            ("train_accuracy", "accuracy/train"),
            ("test_loss", "loss_test"),
            ("test_accuracy", "accuracy/test"),
            ("seconds", "seconds"),
        ):
            if key in record:
                writer.add_scalar(name, record[key], epoch)
        for layer, norm in record.get("sigma", {}).items():
            writer.add_scalar(f"sigma/{layer}", norm, epoch)
        writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
