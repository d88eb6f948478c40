"""The check of the kernels on a GPU, as far as a machine without one can tell: its parts, and a rehearsal of it all."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import sn_fast
from benchmarks import eager_updates, models
from benchmarks.gpu_check import __main__ as command
from benchmarks.gpu_check import plan, profiled, programs, report, results, runner, summary
from benchmarks.gpu_check.context import Context
from benchmarks.gpu_check.profiled import actions
from benchmarks.gpu_check.roofline import layers, total, work
from benchmarks.gpu_check.stages import profile
from benchmarks.gpu_check.timing import Timer, quartiles
from benchmarks.published_loop import PublishedLoop, apply_published_norm

ROOT = Path(__file__).parents[1]


# -- what is compared -------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ELU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=0, dilation=1),
        nn.Flatten(),
        nn.Linear(4 * 2 * 3, 5),
    )


def test_published_loop_finds_the_norms_of_the_layers() -> None:
    torch.manual_seed(0)
    model, x = network(), torch.randn(1, 3, 11, 13)
    sizes = {0: (11, 13), 2: (6, 7), 4: None}
    loop = PublishedLoop(model, x)
    for _ in range(300):
        found = loop.refresh()
    for (i, size), sigma in zip(sizes.items(), found, strict=True):
        wanted = sn_fast.operator_norm(sn_fast.operator_of(model[i], size), method="dense")
        torch.testing.assert_close(sigma, wanted, rtol=1e-4, atol=0)
    for normalised, layer, sigma in zip(loop.normalise(loop.weights, 0.1), (0, 2, 4), found, strict=True):
        torch.testing.assert_close(normalised, model[layer].weight.detach() * 0.1 / sigma, rtol=1e-4, atol=1e-6)


def test_published_loop_takes_the_steps_of_sn_fast() -> None:
    torch.manual_seed(0)
    model, x = network()[:3], torch.randn(1, 3, 11, 13)
    loop = PublishedLoop(model, x)
    sn_fast.apply_spectral_norm(model, x, reduce=False)
    for layer, u in zip(layers(model), loop.us, strict=True):
        u.copy_(layer.state.v[None])
    found = loop.refresh()
    sn_fast.update_spectral_norm(model)
    for layer, sigma, u in zip(layers(model), found, loop.us, strict=True):
        torch.testing.assert_close(sigma, layer.state.sigma, rtol=1e-3, atol=0)  # <A u, v> and |A^T v|
        torch.testing.assert_close(u[0], layer.state.v, rtol=1e-4, atol=1e-5)


def test_published_norm_as_a_parametrization() -> None:
    torch.manual_seed(0)
    model, x = network(), torch.randn(1, 3, 11, 13)
    loop = PublishedLoop(model, x)
    normalised = apply_published_norm(copy.deepcopy(model), x)
    for layer, u in zip([normalised[i] for i in (0, 2, 4)], loop.us, strict=True):
        layer.parametrizations.weight[0].u.copy_(u)
    wanted = [w.detach() for w in loop.normalise(loop.weights)]
    for i, weight in zip((0, 2, 4), wanted):
        torch.testing.assert_close(normalised.eval()[i].weight, weight)
        torch.testing.assert_close(normalised[i].weight, weight)  # in eval mode it stays where it is
    loss = normalised.train()(x).square().sum()
    loss.backward()  # through the iteration
    assert normalised[0].parametrizations.weight.original.grad.norm() > 0
    for _ in range(300):
        normalised(x)
    for i, size in {0: (11, 13), 2: (6, 7), 4: None}.items():
        norm = sn_fast.operator_norm(sn_fast.operator_of(model[i], size), method="dense")
        torch.testing.assert_close(normalised.eval()[i].weight, model[i].weight / max(1.0, norm), rtol=1e-4, atol=1e-6)


def test_eager_updates_are_those_of_torchattacks() -> None:
    torchattacks = pytest.importorskip("torchattacks")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5)).eval()
    x, y = torch.rand(6, 3, 4, 4), torch.randint(5, (6,))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y), leaf)
    attack = torchattacks.PGD(model, eps=0.1, alpha=0.07, steps=1, random_start=False)
    torch.testing.assert_close(eager_updates.linf(x, x, grad, 0.1, 0.07), attack(x, y), rtol=0, atol=1e-7)
    attack = torchattacks.PGDL2(model, eps=0.5, alpha=0.7, steps=1, random_start=False)
    torch.testing.assert_close(eager_updates.l2(x, x, grad, 0.5, 0.7), attack(x, y), rtol=0, atol=1e-6)


def test_networks_are_the_published_ones() -> None:
    counts = {}
    for name, n in models.NETWORKS.items():
        model = n.make()
        counts[name] = (
            sum(isinstance(m, nn.Conv2d) for m in model.modules()),
            sum(p.numel() for p in model.parameters()),
        )
    assert counts == {
        "ResNet-18, 32x32": (20, 11_173_962),
        "ResNet-50, 224x224": (53, 25_557_032),  # as torchvision's
        "WRN-28-10, 32x32": (28, 36_479_194),
    }


def test_least_work_of_a_layer() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Flatten(), nn.Linear(6 * 25, 2))
    sn_fast.apply_spectral_norm(model, torch.randn(1, 4, 5, 5))
    conv, pointwise, linear = (work(x.weight, x.geometry) for x in layers(model))
    assert conv.multiply_adds == 2 * 4 * 8 * 13 * 13  # of 15 taps along an axis two read padding
    assert conv.bytes == 2 * 4 * 4 * 8 * 9 + 2 * 4 * (4 * 25 + 8 * 25)
    assert pointwise == (2 * 4 * 48 + 2 * 4 * 14, 2 * 48)  # a matrix
    assert linear == (2 * 4 * 300 + 2 * 4 * 152, 2 * 300)
    floors = total([conv, linear]).floors({"copy_gb_per_s": 1.0, "tf32_tflop_per_s": 1e-3}, "3xtf32")
    assert floors["memory"] == pytest.approx((conv.bytes + linear.bytes) / 1e3, abs=0.01)
    assert floors["arithmetic"] == pytest.approx(6 * (conv.multiply_adds + linear.multiply_adds) / 1e3, abs=0.01)


# -- the machinery ----------------------------------------------------------------------------------------------------


def test_stages_by_number_and_name() -> None:
    assert [s.number for s in plan.chosen("6,1,3-4,build,profile")] == [1, 3, 4, 6, 7]
    assert plan.chosen("all") == list(plan.STAGES)
    for text in ("8", "0", "power2", ",", "3-9"):
        with pytest.raises(ValueError, match="stage"):
            plan.chosen(text)


def test_no_stage_takes_the_time_of_a_later_one() -> None:
    left = 540.0
    for i, stage in enumerate(plan.STAGES):
        limit = plan.limit_of(stage, plan.STAGES[i:], left)
        assert limit == pytest.approx(stage.seconds * 540 / sum(s.seconds for s in plan.STAGES))
        left -= limit
    assert left == pytest.approx(0, abs=1e-9)


def test_results_are_written_whole_and_without_paths(tmp_path: Path) -> None:
    path = tmp_path / "new" / results.file_name("NVIDIA H100 80GB HBM3")
    assert path.name == "NVIDIA-H100-80GB-HBM3.json"
    assert results.read(path) == {}
    stages = {
        "build": {"error": 'File "/opt/some.where/lib/x.py", line 3; 3 GB/s, and/or, a/b/c', "results": {"n": 1.5}}
    }
    results.write(path, {"schema": results.SCHEMA, "stages": stages})
    assert results.read(path) == {
        "build": {"error": 'File "x.py", line 3; 3 GB/s, and/or, a/b/c', "results": {"n": 1.5}}
    }
    results.write(path, {"schema": 0, "stages": stages})
    assert results.read(path) == {}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_context_records_as_it_goes(tmp_path: Path) -> None:
    context = Context(tmp_path / "out.json", {}, ends=math.inf)
    context.record("a/b/c", 1)
    context.record("a/b/d", 2)

    def broken() -> None:
        raise RuntimeError("no")

    assert context.attempt("part", broken) is None
    assert context.attempt("other", lambda: 3) == 3
    context.ends = 0.0
    assert not context.has_time("the rest", 1.0)
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "results": {"a": {"b": {"c": 1, "d": 2}}, "left_out": ["the rest"]},
        "failures": ["part: RuntimeError: no"],
    }


def test_a_stage_that_is_stopped_or_dies_keeps_what_it_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "benchmarks" / "gpu_check"
    package.mkdir(parents=True)
    script = """
import json, os, sys, time
out = sys.argv[sys.argv.index("--out") + 1]
json.dump({"results": {"half": 1}, "failures": []}, open(out, "w"))
print("working", flush=True)
os._exit(7) if "power" in sys.argv else time.sleep(60)
"""
    for folder in (package, package.parent):  # a folder without it comes after installed packages
        (folder / "__init__.py").write_text("")
    (package / "child.py").write_text(script)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    by_name = {s.name: s for s in plan.STAGES}
    arguments = ([], {}, tmp_path, tmp_path / "nowhere", 0.0)
    stopped = runner._run_stage(by_name["peaks"], 2.0, *arguments)
    died = runner._run_stage(by_name["power"], 30.0, *arguments)
    assert (stopped["status"], died["status"]) == ("timeout", "failed")
    assert stopped["results"] == died["results"] == {"half": 1}
    assert stopped["output"] == ["working"]
    assert died["error"] == "exit code 7"


def test_what_a_stage_started_is_stopped_with_it(tmp_path: Path) -> None:
    """The runner stops a stage; a tool of the stage leads a group of its own, and watches yet another program."""
    alive = tmp_path / "alive"
    program = f"import time, pathlib\nwhile True: pathlib.Path({str(alive)!r}).touch(); time.sleep(0.05)"
    tool = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    stage = tmp_path / "stage.py"
    stage.write_text(f"""
import sys
from benchmarks.gpu_check import child, programs, stages
class Stage:
    def run(context):
        programs.run([sys.executable, "-c", {tool!r}], 60.0)
sys.modules["benchmarks.gpu_check.stages.power"] = Stage
sys.argv = ["child", "power", "--out", {str(tmp_path / "out.json")!r}]
sys.exit(child.main())
""")
    process = subprocess.Popen([sys.executable, str(stage)], env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 60
    while not alive.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive.exists()
    process.terminate()
    assert process.wait(30) != 0
    alive.unlink()
    time.sleep(0.5)
    assert not alive.exists()


def test_a_tool_that_takes_too_long() -> None:
    assert programs.run([sys.executable, "-c", "print('done'); exit(3)"], 60.0) == ("done\n", 3)
    command = [sys.executable, "-uc", "import time; print('began'); time.sleep(60)"]
    assert programs.run(command, 2.0) == ("began\n", None)


def test_times_on_the_host() -> None:
    calls: list[str] = []
    timer = Timer("cpu", 4)
    found = timer.on_device({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, inner=2)
    assert calls == ["a", "b", *"aabbbbaaaabbbbaa"]  # warm-up, then in turn
    assert {name: t["n"] for name, t in found.items()} == {"a": 4, "b": 4}
    assert quartiles([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3}


def test_counters_of_the_profiler() -> None:
    metrics = profile.METRICS
    names = ["ID", "Process ID", "Kernel Name", metrics["microseconds"], metrics["dram_bytes"]]
    names += [metrics["busiest_over_mean_cycles"], metrics["mean_cycles"], metrics["of_fma_pipe"]]
    rows = [
        "==PROF== Connected to process 1",
        "ran: pgd_step 2",
        names,
        ["", "", "", "ns", "Mbyte", "cycle", "cycle", "%"],
        ["0", "1", "sn_fast::power_step_half(sn_fast::HalfStepParams)", "101,500", "98.5", "1200", "1000", "61.25"],
        ["1", "1", "void sn_fast::pgd_step_sample<2, true>(P)", "20", "n/a", "0", "0", ""],
    ]
    text = "\n".join(row if isinstance(row, str) else ",".join(f'"{cell}"' for cell in row) for row in rows)
    first, second = profile.read(text)
    assert first == {
        "kernel": "power_step_half",
        "microseconds": 101.5,
        "dram_bytes": 98.5e6,
        "busiest_over_mean_cycles": 1.2,
        "mean_cycles": 1000.0,
        "of_fma_pipe": 61.25,
    }
    assert second["kernel"] == "pgd_step_sample"
    assert second["microseconds"] == pytest.approx(0.02)
    assert "dram_bytes" not in second
    assert list(profile.read("nothing was profiled")) == []


def test_bars() -> None:
    published = {"host_times_sn_fast": 25.0}
    network = {
        "multiply_adds": 1,
        "fp32": {"power_step": {"times_larger_floor": 2.6}},
        "peers": {"published": published},
    }
    update = {"of_copy": 0.9, "eager_times_sn_fast": 4.5}
    found = {
        "tests": {"counts": {"passed": 3, "failed": 1}, "ended": True},
        "power": {"net": network},
        "updates": {"large, x": {"float32": {"pgd_step inf": update}}},
    }
    stages = {name: {"results": r, "status": "ok", "failures": []} for name, r in found.items()}
    unknown = "not measured"
    verdicts = ["MISS", "MISS", "PASS", unknown, "PASS", "PASS", unknown, unknown]
    assert [b.verdict for b in summary.bars(stages)] == verdicts
    text, misses = summary.summary({"device": "a GPU", "stages": stages}, list(stages))
    assert misses == 2
    assert "90.0%" in text


def test_report(tmp_path: Path) -> None:
    took = {"median": 123.4, "low": 1.0, "high": 2.0, "n": 3}
    network = {
        "multiply_adds": 1,
        "fp32": {
            "power_step": {"time": took, "floors": {"larger": 60.0}, "times_larger_floor": 2.0},
            "update_host": took,
        },
        "peers": {"published": {"host_times_sn_fast": 21.5}},
    }
    trained = {
        "batch": 256,
        "eager": {"step": {"plain": took, "sn_fast": took}, "sn_share": {"of_step": {"device": 0.0081}}},
        "compiled": {"step": {"plain": took}},
    }
    update = {"of_copy": 0.9, "eager_times_sn_fast": 4.5}
    launch = {"kernel": "power_step_half", "microseconds": 98.7}
    found = {
        "power": {"ResNet-18": network},
        "training": {"ResNet-18": trained},
        "updates": {"large": {"float32": {"pgd_step inf": update}}},
        "profile": {"launches": [launch]},
    }
    about = {"date": "2026-11-25T16:00:00+00:00", "sources": "abc", "machine": {"torch": "2.11"}}
    stages = {n: {"results": r, "status": "ok", "failures": [], **about} for n, r in found.items()}
    content = {"schema": results.SCHEMA, "device": "NVIDIA H100", "rehearsal": False, "stages": stages}
    folder, document = tmp_path / "results", tmp_path / "docs" / "benchmarks.md"
    document.parent.mkdir()
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    results.write(folder / "peers_cpu.json", {"something": "else"})
    results.write(folder / "rehearsal.json", content | {"rehearsal": True})
    report.write(tmp_path, folder)
    assert document.read_text() == f"before\n{report.BEGIN}\n\n{report.NOTHING}\n\n{report.END}\nafter\n"
    results.write(folder / "NVIDIA-H100.json", content)
    report.write(tmp_path, folder)
    text = document.read_text()
    assert "**NVIDIA H100, torch 2.11, 2026-11-25, sources abc**" in text
    assert "| ResNet-18 | 123 | 123 | 21.5x |" in text
    assert "| ResNet-18 | eager | 0.1 | 0.1 | – | – | 0.81 % |" in text
    assert "| ResNet-18 | compiled | 0.1 | – | – | – | – |" in text
    assert "| ResNet-18: fp32 kernels / larger floor | 2.00x | <= 2.50x | PASS |" in text
    assert "| pgd_step inf | large, float32 | 90 % | 4.5x |" in text
    assert "| `power_step_half` | 98.7 | – | – | – | – | – |" in text
    assert "old" not in text
    with pytest.raises(ValueError, match="must have one"):
        report.between("no marks", "x")


def test_document_is_as_the_results(tmp_path: Path) -> None:
    """``python -m benchmarks.gpu_check --report`` was not forgotten."""
    (tmp_path / "docs").mkdir()
    document, copy = (root / "docs" / "benchmarks.md" for root in (ROOT, tmp_path))
    copy.write_text(document.read_text())
    report.write(tmp_path, results.FOLDER)
    assert copy.read_text() == document.read_text()


def test_what_is_profiled_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profiler runs a launch again for every group of counters, and is to see none of those before."""
    order: list[str] = []
    monkeypatch.setattr(sys, "argv", ["profiled", "--device", "cuda", "--small"])
    monkeypatch.setattr(profiled, "actions", lambda device, small: iter([("it", lambda: order.append("it"))]))
    for name, place in (("synchronize", torch.cuda), ("start", torch.cuda.profiler), ("stop", torch.cuda.profiler)):
        monkeypatch.setattr(place, name, lambda name=name: order.append(name))
    profiled.main()
    assert order == ["it", "synchronize", "start", "it", "synchronize", "stop"]
    assert len(list(actions("cpu", small=True))) == 5


def test_without_a_gpu_one_clear_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_probe", lambda scratch: {"gpu": False, "torch": "2"})
    assert command.main(["--stages", "5"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "gpu_check: no GPU (torch sees no CUDA device); --rehearse runs every stage on the CPU"
    ]
    assert command.main(["--stages", "nine"]) == 2


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    arguments = ["--rehearse", "--quick", "--out", str(tmp_path)]
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr
    content = json.loads((tmp_path / "rehearsal-on-the-CPU.json").read_text())
    assert content["rehearsal"] is True
    assert {n: (e["status"], e["failures"]) for n, e in content["stages"].items()} == {
        s.name: ("ok", []) for s in plan.STAGES
    }
    assert str(ROOT) not in json.dumps(content)
    assert "MISS" not in run.stdout
