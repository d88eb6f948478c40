"""Computes the runs of a grid: several processes, also of several machines that share the store's folder."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...errors import UserError, first_line
from ...files import replace_file
from ...running import progress_bar
from ..training import DivergedRun, TrainConfig, resume, train
from ..training.lock import InUse
from ..training.run_folder import NotEmpty
from .grid import DIVERGED, FINISHED, Outcome, Store

_POLL_SECONDS = 2.0
_ENDED = (FINISHED, DIVERGED, "failed")
# Gradients of a batch per step, training's own included: what a run costs beside others of its network.
_COST = {"erm": 1, "fgm": 2, "pgm": 16, "wrm": 17}


def compute(
    store: Store,
    runs: Sequence[TrainConfig],
    *,
    jobs: int = 1,
    progress: bool = False,
    retry_failed: bool = False,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Compute what the store lacks, in the order of ``runs``, and return what it then holds of each.

    A run is claimed by the lock of its folder, so that any number of processes may compute one grid; a run that stopped
    half-way is continued by whoever finds it; one that fails is reported and left out.

    Args:
        jobs: number of processes of this call.
        progress: a bar for the whole grid on stderr. Its time left supposes that no run stops early.
        retry_failed: try runs again that failed before (a full disk, missing data), not those that diverged.
        report: called once with the outcome of each run that has ended, when it ends or is found.

    Raises:
        KeyboardInterrupt: all processes have ended, and every run can be continued.
    """
    if retry_failed:
        for config in runs:
            with suppress(FileNotFoundError):
                (store.folder(config) / "failed.json").unlink()
    if jobs == 1 and not progress:
        _work(store.path, runs, report)
        return [store.outcome(config) for config in runs]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_worker, args=(store.path, runs), daemon=True) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    try:
        _watch(store, runs, workers, progress, report)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()
    return [store.outcome(config) for config in runs]


def _work(path: Path, runs: Sequence[TrainConfig], report: Callable[[Outcome], None] = lambda outcome: None) -> None:
    """Compute all runs that nobody else does; at the end wait for none."""
    store = Store(path)
    for config in runs:
        if store.outcome(config).status not in _ENDED:
            _compute_one(store, config)
        if (outcome := store.outcome(config)).status in _ENDED:
            report(outcome)


def _worker(path: Path, runs: Sequence[TrainConfig]) -> None:
    """``_work`` as a process, which Ctrl-C ends quietly: the process that started it speaks."""
    with suppress(KeyboardInterrupt):
        _work(path, runs)


def _compute_one(store: Store, config: TrainConfig) -> None:
    folder = store.folder(config)
    try:
        store.path.mkdir(parents=True, exist_ok=True)
        if (folder / "config.json").is_file():
            resume(folder, {"data_dir": config.data_dir})
        else:
            train(config, folder)
    except (InUse, DivergedRun):
        return  # another process computes it, or its metrics.json says so
    except NotEmpty as error:
        if not (folder / "config.json").is_file():
            _record_failure(folder, error)
        # else another process has begun it in this moment
    except Exception as error:  # a network of the user's may raise anything
        if store.outcome(config).status in _ENDED:
            return  # another process has computed it meanwhile
        _record_failure(folder, error)


def _record_failure(folder: Path, error: Exception) -> None:
    reason = str(error) if isinstance(error, UserError) else first_line(error)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "failed.json", json.dumps({"reason": reason}, indent=1).encode())


def _watch(
    store: Store, runs: Sequence[TrainConfig], workers: Sequence[Any], progress: bool, report: Callable[[Outcome], None]
) -> None:
    """Show how far the grid is, whoever computes it, until this call's processes have ended."""
    costs = [_COST[config.scheme] * config.epochs for config in runs]
    ended: dict[str, Outcome] = {}  # by key; their files are not read again
    with progress_bar(progress, "runs", sum(costs)) as bar:
        shown = 0
        while True:
            alive = any(worker.is_alive() for worker in workers)
            done = 0
            for config, cost in zip(runs, costs):
                if (key := config.key()) not in ended:
                    outcome = store.outcome(config)
                    if outcome.status not in _ENDED:
                        done += cost * outcome.epochs_done // config.epochs
                        continue
                    ended[key] = outcome
                    report(outcome)
                done += cost
            bar.set_description_str(f"run {len(ended)}/{len(runs)}", refresh=False)
            bar.update(done - shown)
            shown = done
            if not alive:
                return
            time.sleep(_POLL_SECONDS)


def describe(outcome: Outcome) -> str:
    """One line about a run that has ended."""
    name = outcome.config.key()
    if outcome.status != FINISHED:
        return f"{name}: {outcome.status}: {outcome.reason}"
    known = outcome.final["accuracy"]
    shown = [part for part in ("train", "validation", "test") if part in known]
    parts = ", ".join(f"{part} {100 * outcome.accuracy(part):.2f}" for part in shown)
    return f"{name}: {outcome.epochs_done} epochs, accuracy (%) {parts}"
