"""examples/train_gpt.py: two ranks are as one process, and a killed one is restarted from a checkpoint."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch.distributed.fsdp")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_gpt.py"
SMALL = ["--width", "32", "--context", "32", "--batch-size", "8"]


def alone(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, float]]:
    """The records of a run in this process."""
    runpy.run_path(str(SCRIPT))["main"]([*SMALL, *arguments])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def torchrun(*arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2", str(SCRIPT), *SMALL, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def records(process: subprocess.Popen[str]) -> list[dict[str, float]]:
    out, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")]


def losses(found: list[dict[str, float]]) -> dict[int, float]:
    return {int(r["step"]): r["loss"] for r in found if "step" in r}


def children_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes of torchrun in /proc")
def test_a_killed_rank_is_restarted_and_nothing_else_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["--steps", "30", "--save-every", "3", "--out", str(out), "--beta", "0.9"]
    process = torchrun(*arguments, restarts=1)
    try:
        deadline = time.monotonic() + 200
        while not (out / "step-000006").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(children_of(process.pid)[-1], signal.SIGKILL)
        found = records(process)
    finally:
        process.kill()
    assert any("continued from" in r for r in found), "no process was restarted"
    wanted = alone(capsys, "--steps", "30", "--beta", "0.9")
    ours, theirs = losses(found), losses(wanted)
    assert ours.keys() == theirs.keys()
    for step, loss in theirs.items():
        assert ours[step] == pytest.approx(loss, rel=1e-4)
    assert theirs[30] < 0.9 * theirs[1]
    assert found[-1]["largest norm"] == pytest.approx(wanted[-1]["largest norm"], rel=1e-3)
    assert wanted[-1]["largest norm"] < 0.9 * 1.1
    # A checkpoint of two ranks goes on in one process.
    more = alone(capsys, "--steps", "31", "--beta", "0.9", "--out", str(out))
    assert list(losses(more)) == [31]


def test_the_parametrization_is_that_of_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--normalize", "parametrization", "--steps", "4", "--beta", "0.9"]
    found, wanted = records(torchrun(*arguments)), alone(capsys, *arguments)
    for step, loss in losses(wanted).items():
        assert losses(found)[step] == pytest.approx(loss, rel=1e-4)


def test_a_text_and_whole_spectra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text"
    text.write_text("to be or not to be, that is the question. " * 40)
    found = alone(capsys, "--steps", "15", "--data", str(text), "--cap-singular-values", "--beta", "1.5")
    assert losses(found)[15] < 0.8 * losses(found)[1]
    assert found[-1]["largest norm"] <= 1.5 * 1.002
    with pytest.raises(SystemExit, match="has 1680 bytes; --context 5000 needs more"):
        alone(capsys, "--data", str(text), "--context", "5000")


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for step in (1_000_000, 900, 999_900):
        (tmp_path / f"step-{step:06d}").mkdir()
    training = argparse.Namespace(options=argparse.Namespace(out=str(tmp_path)))
    found = runpy.run_path(str(SCRIPT))["Training"].saved(training)
    assert [folder.name for folder in found] == ["step-000900", "step-999900", "step-1000000"]
