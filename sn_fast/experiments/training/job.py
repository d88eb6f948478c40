"""The job: train the networks side by side, evaluate them, and leave a folder from which it can be resumed."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ... import _interrupts
from ...errors import UserError, first_line, require
from ...running import notice, progress_bar, torch_threads
from ..data import Split, load_data
from ..networks import layer_norms
from .config import TrainConfig, json_number
from .errors import Diverged, DivergedRun, Interrupted
from .evaluate import accuracy, attacked, distinct, evaluate, evaluation_labels, evaluations
from .loop import Trainee
from .plots import write_plots
from .ranks import ALONE, Ranks
from .run_folder import FollowersFolder, RunFolder
from .scalars import Scalars
from .side_by_side import SharedBar, has_cores_for, side_by_side

_TEST_POINTS = 6
"""How often the test set is attacked while training: enough for a curve, too seldom to rule the time."""
_NORM_POINTS = 60
"""How often the layers' norms are measured while training, besides the first and the last epoch."""


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder, its configuration, and the content of its metrics.json."""

    path: Path
    config: TrainConfig
    metrics: dict[str, Any]

    def document(self) -> dict[str, Any]:
        """The run as one JSON document."""
        return {"run": str(self.path), "config": self.config.to_json(), **self.metrics}


def train(
    config: TrainConfig,
    out: str | os.PathLike[str] | None = None,
    *,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Run the whole job in a new folder (``out``; None: a new one in runs/). ``progress`` shows a bar on stderr.

    ``ranks``: the processes that share every batch; all call this function. The losses are those of one process.

    Raises:
        UserError: an option, a package, the data or the disk does not allow it. DivergedRun: the loss diverged.
        Interrupted: Ctrl-C; ``resume`` continues.
    """
    if not ranks.leads:
        return _follow(ranks, config.data_dir)
    with ranks.leading():
        _check_packages(config)
        split, config = _prepared(config)
        folder = RunFolder.create(out, default=f"{config.data}-{config.scheme}-beta{config.beta:g}-seed{config.seed}")
        with folder.discarded_if_empty(), folder.locked("out"), _resumable(folder):
            folder.check_unused()  # another process may have been there between
            folder.write_json("config.json", config.to_json())
            ranks.tell(folder.path)
            with torch_threads(config.threads):
                return _Run(config, folder, split, ranks).complete(progress)


def resume(
    path: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
    *,
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> RunResult:
    """Continue a run from its last finished epoch, bit by bit as if it had not stopped (on a CPU).

    Args:
        options: some options by name, which must be those of the run; ``data_dir`` may be another.
        ranks: as of ``train``; their number may be another.

    Raises:
        UserError: the folder holds no run, a damaged one, or one with other options. Otherwise as ``train``.
    """
    options = dict(options or {})
    moved = options.pop("data_dir", None)
    if not ranks.leads:
        return _follow(ranks, moved)
    with ranks.leading(), _opened(path) as folder:
        state = folder.read_checkpoint() if folder.has_checkpoint() else None
        config = config_of(folder, state)
        config.refuse_changes(options)
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UserError(f"argument `path`: {path} was trained on CUDA, and this PyTorch has no CUDA device")
        _check_packages(config)
        split, _ = _prepared(config if moved is None else replace(config, data_dir=moved))
        ranks.tell(folder.path)
        with torch_threads(config.threads):
            run = _Run(config, folder, split, ranks)
            if state is None:
                notice(f"{path} has no checkpoint yet: the run starts from the beginning, with the options it has")
            else:
                run.load(state)
            return run.complete(progress)


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[RunFolder]:
    """The folder of an earlier run, for this process alone."""
    folder = RunFolder.existing(path)
    with folder.locked("path"), _resumable(folder):
        yield folder


def _follow(ranks: Ranks, data_dir: str | None) -> RunResult:
    """A process that does not lead: the same computation, from the leader's folder and into no files."""
    folder = FollowersFolder(ranks.told())
    state = folder.read_checkpoint() if folder.has_checkpoint() else None
    config = config_of(folder, state)
    split, _ = _prepared(config if data_dir is None else replace(config, data_dir=data_dir))
    with torch_threads(config.threads):
        run = _Run(config, folder, split, ranks)
        if state is not None:
            run.load(state)
        return run.complete(progress=False)


def _prepared(config: TrainConfig) -> tuple[Split, TrainConfig]:
    """The data of a run, and its configuration with what depends on them."""
    split = load_data(config.data, **config.data_options())
    config.check_training_images(len(split.train))
    return split.to(config.device), config.with_strength(split.mean_norm)


def config_of(folder: RunFolder, state: Mapping[str, Any] | None) -> TrainConfig:
    """The options of a run to resume; without a checkpoint those that it began with."""
    values = folder.read_config()
    trained = None if state is None else state.get("config")
    try:
        config = TrainConfig.from_json(values)
        # Not as they are written: an earlier version may have begun the run, without the options that came later.
        same = state is None or values == trained or config == TrainConfig.from_json(trained or {})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"argument `path`: {folder.path / 'config.json'} is no configuration of this version "
            f"({first_line(error)}); start a new run"
        ) from None
    if not same:
        raise UserError(
            f"argument `path`: {folder.path / 'config.json'} is not the configuration that checkpoint.pt was "
            "trained with; restore it, or start a new run"
        )
    return config


@contextmanager
def _resumable(folder: RunFolder) -> Iterator[None]:
    """Ctrl-C says how to continue, if there is something to continue."""
    try:
        yield
    except KeyboardInterrupt:
        if not folder.is_begun():
            raise
        raise Interrupted(folder.path) from None


def _check_packages(config: TrainConfig) -> None:
    """Before hours of work, not after."""
    for module in ("sklearn", "matplotlib", "tqdm"):
        require(module)
    if config.tensorboard:
        require("tensorboard", "tensorboard")


class _Run:
    def __init__(self, config: TrainConfig, folder: RunFolder, split: Split, ranks: Ranks) -> None:
        self.config = config
        self.folder = folder
        self.split = split
        self.writes_scalars = config.tensorboard and ranks.leads
        self.image_shape = split.train.x.shape[1:]
        self.trainees = [
            Trainee.create(beta, self.image_shape, split.num_classes, config, ranks=ranks) for beta in config.betas
        ]
        self.epoch = 0
        # One process of several computes in step with the others, and a GPU is one for both networks.
        alone = ranks.size == 1 and config.device == "cpu" and not config.compile
        alone = alone and not any(trainee.draws for trainee in self.trainees)  # in an order that would be chance
        self.at_once = alone and has_cores_for(config.threads * len(self.trainees))

    def load(self, state: dict[str, Any]) -> None:
        try:
            self.epoch = state["epoch"]
            same_data = state.get("mean_norm", self.split.mean_norm) == self.split.mean_norm
            for trainee in self.trainees:
                trainee.load(state["networks"][trainee.name])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"argument `path`: the checkpoint in {self.folder.path} is not of these networks ({reason}); "
                "resume with the version of sn_fast that wrote it, or start a new run"
            ) from None
        if not same_data:
            raise UserError(
                f"argument `path`: {self.folder.path} was trained on other images than those of {self.config.data} "
                f"in {self.config.data_dir}; restore them, or start a new run"
            )

    def complete(self, progress: bool) -> RunResult:
        """Train what is left to train, then evaluate."""
        try:
            self._train(progress)
            return self._finish(progress)
        finally:
            _interrupts.note("")

    def _train(self, progress: bool) -> None:
        config = self.config
        if self.epoch == 0:
            self._save()
        batches = config.batches(len(self.split.train))
        epochs = config.epochs * len(self.trainees)
        done = sum(len(trainee.epochs) for trainee in self.trainees)
        with (
            closing(Scalars(self.folder.path, self.writes_scalars, self.epoch + 1)) as scalars,
            progress_bar(progress, "training", epochs * batches, done * batches) as bar,
        ):
            for epoch in range(self.epoch + 1, config.epochs + 1):
                trained = [trainee for trainee in self.trainees if not trainee.stopped]
                if not trained:
                    break
                bar.set_description_str(f"epoch {epoch}/{config.epochs}", refresh=False)
                shared = SharedBar(bar)
                with self._divergence_explained():
                    records = side_by_side(
                        [partial(self._train_epoch, trainee, epoch, shared) for trainee in trained],
                        at_once=self.at_once,
                    )
                for trainee, record in zip(trained, records, strict=True):
                    trainee.epochs.append(record)
                    scalars.write(trainee.name, record)
                self.epoch = epoch
                self._save()
                self._keep(trained)

    def _train_epoch(self, trainee: Trainee, epoch: int, bar: SharedBar) -> dict[str, Any]:
        config = self.config
        with _named_divergence(trainee, epoch):
            record = trainee.train_epoch(self.split.train, epoch, bar)
            if epoch == 1 or epoch % math.ceil(config.epochs / _NORM_POINTS) == 0:
                record["sigma"] = layer_norms(trainee.model, self.image_shape)
            if epoch % math.ceil(config.epochs / _TEST_POINTS) == 0:
                labels = evaluation_labels(config)
                result = attacked(trainee.model, self.split.test, config.training_adversary, labels=labels)
                record["test_loss"] = float(F.cross_entropy(result.logits, self.split.test.y))
                record["test_accuracy"] = accuracy(result.logits, self.split.test.y)
        return record

    @contextmanager
    def _divergence_explained(self) -> Iterator[None]:
        try:
            yield
        except Diverged as error:
            lr, reason = self.config.lr, str(error)
            self.folder.write_json("metrics.json", {**self._metrics("diverged"), "reason": reason})
            raise DivergedRun(
                f"argument `lr`: {lr:g} is too large: {reason}; start again with "
                f"`lr` {lr / 5:g} or smaller ({self.folder.path} holds epoch {self.epoch})"
            ) from None

    def _save(self) -> None:
        # The checkpoint first: the metrics can be made from it, not the other way round.
        self.folder.write_checkpoint(
            {
                "config": self.config.to_json(),
                "epoch": self.epoch,
                "mean_norm": self.split.mean_norm,
                "image_shape": tuple(self.image_shape),
                "num_classes": self.split.num_classes,
                "networks": {trainee.name: trainee.state() for trainee in self.trainees},
            }
        )
        self.folder.write_json("metrics.json", self._metrics("training"))
        _interrupts.note(_interrupts.how_to_continue(self.folder.path))

    def _keep(self, trained: list[Trainee]) -> None:
        every = self.config.keep_every
        if every and self.epoch % every == 0:
            for trainee in trained:
                self.folder.write_weights(f"weights-{trainee.name}-epoch{self.epoch}.pt", trainee.model.state_dict())

    def _metrics(self, status: str, final: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
        networks = {
            trainee.name: {
                "beta": json_number(trainee.beta),
                "epochs": trainee.epochs,
                **({"final": final[trainee.name]} if final else {}),
            }
            for trainee in self.trainees
        }
        images = {part: len(samples) for part, samples in self.split.items()}
        return {"status": status, "epochs_done": self.epoch, "images": images, "networks": networks}

    def _evaluate(self, trainee: Trainee, bar: SharedBar) -> dict[str, Any]:
        with _named_divergence(trainee, self.epoch):
            return evaluate(trainee.model, self.split, self.config, lambda: bar.update(1))

    def _finish(self, progress: bool) -> RunResult:
        attacks = len(distinct(*evaluations(self.config))) * len(self.split.items())
        with progress_bar(progress, "evaluating", attacks * len(self.trainees)) as bar, self._divergence_explained():
            shared = SharedBar(bar)
            measured = side_by_side(
                [partial(self._evaluate, trainee, shared) for trainee in self.trainees], at_once=self.at_once
            )
        for trainee in self.trainees:
            if "sigma" not in trainee.epochs[-1]:
                trainee.epochs[-1]["sigma"] = layer_norms(trainee.model, self.image_shape)
        final = {
            trainee.name: {
                **found,
                "sigma": trainee.epochs[-1]["sigma"],
                "seconds_per_epoch": statistics.median(epoch["seconds"] for epoch in trainee.epochs),
            }
            for trainee, found in zip(self.trainees, measured, strict=True)
        }
        metrics = self._metrics("finished", final)
        self.folder.write_json("metrics.json", metrics)
        write_plots(self.folder, self.config, metrics)
        return RunResult(self.folder.path, self.config, metrics)


@contextmanager
def _named_divergence(trainee: Trainee, epoch: int) -> Iterator[None]:
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{error} in epoch {epoch} with {trainee.name}") from None
