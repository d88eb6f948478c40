from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from sn_fast.experiments.training import UserError, job
from sn_fast.experiments.training.errors import Diverged
from sn_fast.experiments.training.loop import Trainee
from sn_fast.experiments.training.side_by_side import SharedBar, has_cores_for, side_by_side

from .conftest import without_times
from .test_job import assert_same_run


def test_results_in_order_with_the_first_in_this_thread() -> None:
    meet = threading.Barrier(3, timeout=30)

    def call(i: int) -> tuple[int, bool, int]:
        meet.wait()  # nobody gets past it unless all run at the same time
        return i, threading.current_thread() is threading.main_thread(), torch.get_num_threads()

    before = torch.get_num_threads()
    found = side_by_side([lambda i=i: call(i) for i in range(3)], at_once=True)  # type: ignore[misc]
    assert found == [(0, True, before), (1, False, before), (2, False, before)]
    order: list[int] = []
    assert side_by_side([lambda: order.append(1), lambda: order.append(2)], at_once=False) == [None, None]
    assert order == [1, 2]
    assert side_by_side([], at_once=True) == []
    assert not has_cores_for(10**6)
    assert has_cores_for(1)


@pytest.mark.parametrize("failing", [{0}, {1}, {0, 1}, {1, 2}])
def test_the_error_of_the_first_that_fails(failing: set[int]) -> None:
    def call(i: int) -> int:
        if i in failing:
            raise Diverged(f"number {i}")
        return i

    with pytest.raises(Diverged, match=f"number {min(failing)}"):
        side_by_side([lambda i=i: call(i) for i in range(3)], at_once=True)  # type: ignore[misc]
    assert threading.active_count() <= 2  # the watch of the command's signals may be there


def test_what_ends_one_ends_all() -> None:
    ended, started = threading.Event(), threading.Event()

    def endless() -> None:
        started.set()
        try:
            while True:
                torch.ones(10).sum()
        finally:
            ended.set()

    def interrupted() -> None:
        assert started.wait(30)
        raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        side_by_side([interrupted, endless], at_once=True)
    assert ended.is_set()
    assert time.monotonic() - began < 30


def test_no_step_of_a_shared_bar_is_lost() -> None:
    class Bar:
        n = 0

        def update(self, n: int) -> None:
            before = self.n
            time.sleep(1e-5)  # lets another thread in
            self.n = before + n

        def set_postfix_str(self, text: str, refresh: bool) -> None: ...

    bar = Bar()
    shared = SharedBar(bar)
    side_by_side([lambda: [shared.update(1) for _ in range(200)]] * 3, at_once=True)
    assert bar.n == 600


@pytest.mark.parametrize("options", [{}, {"scheme": "wrm"}, {"gradient": "full"}])
def test_a_run_in_two_threads_has_the_bits_of_one_in_turn(tiny_run, monkeypatch, options) -> None:
    """Threads: of every network's own training; u, v, sigma, the optimizer and the evaluation included."""
    monkeypatch.setattr(job, "write_plots", lambda *args: None)  # they take most of the time
    runs, threads = {}, {}
    train_epoch = Trainee.train_epoch
    for cores in (1, 2):
        used = threads[cores] = set()

        def noted(self, *args, used=used):
            used.add((self.name, threading.get_ident()))
            return train_epoch(self, *args)

        monkeypatch.setattr(Trainee, "train_epoch", noted)
        monkeypatch.setattr(job, "has_cores_for", lambda wanted, cores=cores: wanted <= cores)
        runs[cores] = tiny_run(f"cores{cores}", **options)
    assert len({thread for _, thread in threads[1]}) == 1
    assert len({thread for _, thread in threads[2]}) >= 2
    assert_same_run(runs[1].path, runs[2].path)
    assert without_times(runs[1].metrics) == without_times(runs[2].metrics)


def test_a_network_that_diverges_in_the_other_thread(tiny_run, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(job, "has_cores_for", lambda wanted: True)
    train_epoch = Trainee.train_epoch

    def diverging(self, samples, epoch, bar):
        if epoch == 2 and self.beta < 100:
            raise Diverged("the loss became nan")
        return train_epoch(self, samples, epoch, bar)

    monkeypatch.setattr(Trainee, "train_epoch", diverging)
    with pytest.raises(UserError, match=r"the loss became nan in epoch 2 with beta=1\.2; .*holds epoch 1"):
        tiny_run("run", beta=1.2)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["status"] == "diverged"
    assert {len(network["epochs"]) for network in metrics["networks"].values()} == {1}
