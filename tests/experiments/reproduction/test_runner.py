from __future__ import annotations

import json
from pathlib import Path

import pytest

from sn_fast.errors import UserError
from sn_fast.experiments.reproduction import Outcome, Store, compute, describe, runner
from sn_fast.experiments.training import TrainConfig

from ..analysis.outcomes import outcome
from ..training.conftest import without_times
from .conftest import OPTIONS, tiny


def metrics(store: Store, config: TrainConfig) -> dict:
    return without_times(json.loads((store.folder(config) / "metrics.json").read_text()))


def test_a_grid_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, runs = Store(tmp_path), tiny().runs()
    outcomes = compute(store, runs)
    assert [o.status for o in outcomes] == ["finished"] * 4
    assert all(0 < o.accuracy(part) < 1 for o in outcomes for part in ("train", "validation", "test"))
    monkeypatch.setattr(runner, "train", None)  # would be called for anything that is missing
    monkeypatch.setattr(runner, "resume", None)
    assert [o.final for o in compute(store, runs)] == [o.final for o in outcomes]


def test_a_run_without_validation_images_is_described() -> None:
    text = describe(outcome(0.9, None, 0.75))
    assert text.endswith("4 epochs, accuracy (%) train 90.00, test 75.00")
    assert "validation 80.00" in describe(outcome())


def test_runs_do_not_depend_on_each_other(tmp_path: Path) -> None:
    """Those of one process, in another order, have the bits of the first."""
    runs = tiny(schemes=("fgm",)).runs()
    one, other = Store(tmp_path / "one"), Store(tmp_path / "other")
    compute(one, runs)
    compute(other, runs[::-1])
    for config in runs:
        assert metrics(one, config) == metrics(other, config)


def test_an_interrupted_grid_continues_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = tiny(schemes=("fgm",)).runs()
    whole, stopped = Store(tmp_path / "whole"), Store(tmp_path / "stopped")
    compute(whole, runs)
    with monkeypatch.context() as patch:

        def interrupted(run, trained) -> None:
            if run.config.beta == 1.0:
                raise KeyboardInterrupt

        patch.setattr("sn_fast.experiments.training.job._Run._keep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compute(stopped, runs)
    assert [stopped.outcome(c).status for c in runs] == ["finished", "training"]
    assert stopped.outcome(runs[1]).epochs_done == 1
    compute(stopped, runs)
    for config in runs:
        assert metrics(whole, config) == metrics(stopped, config)


def test_a_run_that_another_process_computes_is_left_to_it(tmp_path: Path) -> None:
    store, runs = Store(tmp_path), tiny(schemes=("erm",)).runs()
    from sn_fast.experiments.training.lock import locked

    store.folder(runs[0]).mkdir(parents=True)
    with locked(store.folder(runs[0]), "out"):
        outcomes = compute(store, runs)
    assert [o.status for o in outcomes] == ["absent", "finished"]
    assert [o.status for o in compute(store, runs)] == ["finished"] * 2


def test_a_failed_run_is_reported_and_left_out_until_asked_for(tmp_path: Path, monkeypatch) -> None:
    store, runs = Store(tmp_path), tiny(schemes=("erm",)).runs()

    def failing(config: TrainConfig, folder: Path) -> None:
        raise UserError("the disk is full") if config.beta == 1.0 else ValueError("boom\nmore")

    reported: list[Outcome] = []
    with monkeypatch.context() as patch:
        patch.setattr(runner, "train", failing)
        outcomes = compute(store, runs, report=reported.append)
    assert [(o.status, o.reason) for o in outcomes] == [
        ("failed", "ValueError: boom"),
        ("failed", "the disk is full"),
    ]
    assert [describe(o).rpartition(": ")[2] for o in reported] == ["boom", "the disk is full"]
    assert [o.status for o in compute(store, runs)] == ["failed"] * 2
    assert [o.status for o in compute(store, runs, retry_failed=True)] == ["finished"] * 2


def test_a_diverged_run_is_a_result_and_not_averaged(tmp_path: Path) -> None:
    grid = tiny(schemes=("erm",), options={**OPTIONS, "lr": 1e30})
    outcomes = compute(Store(tmp_path), grid.runs())
    assert "diverged" in [o.status for o in outcomes]
    diverged = next(o for o in outcomes if o.status == "diverged")
    assert "epoch 1" in diverged.reason or "epoch 2" in diverged.reason
    from sn_fast.experiments.analysis import accuracy_table

    text = accuracy_table(outcomes).text()
    assert "diverged" in text
    assert "nan" not in text.partition("diverged")[0]  # no number of it; the reason may say nan


@pytest.mark.slow
def test_several_processes_share_a_grid(tmp_path: Path) -> None:
    runs = tiny().runs()
    compute(Store(tmp_path), runs, jobs=2, progress=True)
    assert {Store(tmp_path).outcome(c).status for c in runs} == {"finished"}
