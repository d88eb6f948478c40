"""examples/train_imagenet.py: trained on two ranks, one of which is killed; and the faults that it is to survive."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import sn_fast
from sn_fast.errors import UserError
from sn_fast.experiments.training.ranks import ALONE

from .process_groups import process_group

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "train_imagenet.py"
pytest.importorskip("torch.distributed.fsdp", reason="this PyTorch has no torch.distributed.fsdp")
TINY = ["--data", "synthetic", "--arch", "small_elu", "--image-size", "16", "--images", "64", "--batch-size", "16"]
TINY += ["--steps", "2", "--save-every", "2", "--log-every", "1", "--max-steps", "7", "--device", "cpu"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_imagenet", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(**changes: Any) -> argparse.Namespace:
    defaults = {"eps": 0.02, "steps": 2, "bf16": False, "batch_size": 8, "lr": 0.1}
    return argparse.Namespace(**{**defaults, **changes})


def small() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    sn_fast.apply_spectral_norm(network, torch.rand(1, 3, 6, 6))
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    return network, optimizer, torch.rand(8, 3, 6, 6), torch.arange(8) % 3


def bits(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in network.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name]) for name, t in one.items())


def test_a_loss_that_is_not_finite_moves_nothing(script: ModuleType) -> None:
    network, optimizer, x, y = small()
    assert script.train_step(network, optimizer, x, y, options(), ALONE) is not None
    network(x)
    before, momentum = bits(network), [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    handle = network.register_forward_hook(lambda module, args, logits: logits * torch.nan)
    assert script.train_step(network, optimizer, x, y, options(), ALONE) is None
    handle.remove()
    assert same(before, bits(network))
    assert all(map(torch.equal, momentum, [s["momentum_buffer"] for s in optimizer.state.values()]))
    loss, accuracy = script.train_step(network, optimizer, x, y, options(), ALONE)
    assert 0 < loss < 10
    assert 0 <= accuracy <= 1
    assert not same(before, bits(network))


def test_a_checkpoint_cut_short_is_one_line_and_stays(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with process_group(tmp_path):
        network, optimizer, x, y = small()
        assert script.restored(network, optimizer, path, ALONE) == 0  # there is none
        for _ in range(2):
            script.train_step(network, optimizer, x, y, options(), ALONE)
        network(x)
        script.saved(network, optimizer, 2, path, ALONE)
        whole, trained = path.read_bytes(), bits(network)
        for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(
                UserError, match=r"checkpoint\.pt is damaged \(.*\); restore a copy, or move it"
            ) as caught:
                script.restored(*small()[:2], path, ALONE)
            assert "\n" not in str(caught.value)
            assert path.read_bytes() == whole[:length]
        path.write_bytes(whole)
        other, its_optimizer = small()[:2]
        assert script.restored(other, its_optimizer, path, ALONE) == 2
        assert same(trained, bits(other))
        for n, o in ((network, optimizer), (other, its_optimizer)):
            script.train_step(n, o, x, y, options(), ALONE)
        assert same(bits(network), bits(other))
        assert [p.name for p in tmp_path.iterdir() if "checkpoint" in p.name] == ["checkpoint.pt"]


def test_every_image_of_whole_batches_is_seen_once(script: ModuleType) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(22))
    given = argparse.Namespace(seed=3, batch_size=6, workers=0)
    parts = [[b[0].tolist() for b in script.batches(data, 1, 0, given, script.Ranks(r, 2))] for r in range(2)]
    assert [len(p) for p in parts] == [3, 3]
    seen = [i for rank in parts for part in rank for i in part]
    assert len(seen) == len(set(seen)) == 18
    resumed = [b[0].tolist() for b in script.batches(data, 1, 2, given, script.Ranks(1, 2))]
    assert resumed == parts[1][2:]


def torchrun(out: Path, *arguments: str, kill_after: str = "", restarts: int = 0) -> str:
    """The output of a run on two ranks; the second is killed as soon as a line holds ``kill_after``."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", str(SCRIPT), *TINY, "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.Popen(
        [*command, *arguments], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines, pid = [], 0
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        started = re.search(r"rank 1 of 2, process (\d+)", line)
        pid = int(started[1]) if started else pid
        if kill_after and pid and kill_after in line:
            os.kill(pid, signal.SIGKILL)
            kill_after = ""
    output = "".join(lines)
    assert process.wait(60) == 0, output
    return output


def losses(output: str) -> dict[int, float]:
    """Of every step, as the last try printed it."""
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+): loss ([\d.]+)", output, re.MULTILINE)}


@pytest.mark.slow
def test_a_killed_rank_costs_the_last_interval_and_nothing_else(tmp_path: Path) -> None:
    whole = torchrun(tmp_path / "whole")
    wanted = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    assert wanted["step"] == 7
    assert sorted(losses(whole)) == [*range(1, 8)]
    for parallel in ("ddp", "fsdp"):
        folder = tmp_path / parallel
        output = torchrun(folder, "--parallel", parallel, kill_after="step 3: loss", restarts=1)
        starts = {int(step) for step in re.findall(r"starts after step (\d) of 7", output)}
        assert 0 in starts
        assert max(starts) in (2, 4)  # a checkpoint later if the others were quick
        assert losses(output) == pytest.approx(losses(whole), rel=2e-3)
        found = torch.load(folder / "checkpoint.pt", weights_only=True)
        assert found["step"] == 7
        assert found["model"].keys() == wanted["model"].keys()
        for name, tensor in wanted["model"].items():
            if parallel == "ddp":
                assert torch.equal(found["model"][name], tensor), name
            elif name.endswith(("original", "bias")):  # sharded, u and v start anew after a load
                torch.testing.assert_close(found["model"][name], tensor, rtol=1e-3, atol=1e-3)
        assert [p.name for p in folder.iterdir()] == ["checkpoint.pt"]
    # What one kind of parallelism wrote, another reads.
    output = torchrun(tmp_path / "fsdp", "--parallel", "ddp", "--max-steps", "8")
    assert len(re.findall("starts after step 7 of 8", output)) == 2
    assert "test accuracy" in output
