"""The parent: finds out what is there, runs the stages one after the other, writes the results, prints the summary."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import results
from .plan import Stage, limit_of
from .summary import summary

_TAIL = 40  # lines of a stage's output that are kept if it fails
_NVIDIA_SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


def run(stages: Sequence[Stage], *, out: Path | None, budget: float, quick: bool, rehearse: bool, commit: str) -> int:
    """Run ``stages``; the exit code is 0 if nothing failed, 2 without a GPU."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sn_fast_gpu_check_") as folder:
        scratch = Path(folder)
        found = _probe(scratch)
        if not rehearse and not found.get("gpu"):
            why = found.get("error") or "torch sees no CUDA device"
            print(f"gpu_check: no GPU ({why}); --rehearse runs every stage on the CPU", file=sys.stderr)
            return 2
        device = "rehearsal on the CPU" if rehearse else str(found["name"])
        # A rehearsal leaves nothing in the repository unless it is told where.
        file = (out or (scratch if rehearse else results.FOLDER)) / results.file_name(device)
        tree = results.ROOT if rehearse else build_folder(results.sources_digest())
        about = {
            "commit": commit or results.commit(),
            "sources": results.sources_digest(),
            "machine": {k: v for k, v in found.items() if k != "gpu"},
        }
        known = {} if rehearse else {k: v for k, v in results.read(file).items() if v["sources"] == about["sources"]}
        content: dict[str, Any] = {"schema": results.SCHEMA, "device": device, "rehearsal": rehearse, "stages": known}
        _say(began, f"{device}; torch {found.get('torch')}; sources {about['sources']} {about['commit']}")
        for i, stage in enumerate(stages):
            limit = limit_of(stage, stages[i:], budget - (time.monotonic() - began))
            _say(began, f"-- {stage.number} {stage.name}: {stage.title}; at most {limit:.0f} s")
            options = [*(["--rehearse"] if rehearse else []), *(["--quick"] if quick else [])]
            entry = _run_stage(stage, limit, options, content["stages"], scratch, tree, began)
            content["stages"][stage.name] = entry | about | {"date": _now(), "clocks": {} if rehearse else _clocks()}
            results.write(file, content)
            _say(began, f"-- {stage.name}: {entry['status']} in {entry['seconds']:.0f} s")
        text, misses = summary(content, [s.name for s in stages])
        print(f"\n{text}", flush=True)
        if out or not rehearse:
            print(f"\nwritten: {file}")
    failed = [s.name for s in stages if content["stages"][s.name]["status"] != "ok"]
    failed += [s.name for s in stages if content["stages"][s.name]["failures"]]
    if failed:
        print(f"failed: {', '.join(dict.fromkeys(failed))}")
    _say(began, "a rehearsal: the times mean nothing" if rehearse else f"{misses} bars missed")
    return 1 if failed else 0


def build_folder(digest: str) -> Path:
    """Where the build stage puts its copy of the sources; one per digest, so that a later call finds it again."""
    return Path(tempfile.gettempdir()) / f"sn_fast_gpu_check_{os.getuid()}_{digest}"


def _run_stage(
    stage: Stage, limit: float, options: list[str], known: dict[str, Any], scratch: Path, tree: Path, began: float
) -> dict[str, Any]:
    out, previous = scratch / f"{stage.name}.json", scratch / "previous.json"
    previous.write_text(json.dumps({name: entry["results"] for name, entry in known.items()}))
    command = [sys.executable, "-m", "benchmarks.gpu_check.child", stage.name, "--out", str(out)]
    command += ["--previous", str(previous), "--seconds", f"{limit:.1f}", *options]
    # The build makes the tree in which all others run; where it was not run, they take what is installed.
    home = tree if stage.name != "build" and (tree / "benchmarks").is_dir() else results.ROOT
    lines: list[str] = []
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=home,
        env=_environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    reader = threading.Thread(target=_follow, args=(process, lines, began), daemon=True)
    reader.start()
    status, error = "ok", ""
    try:
        if process.wait(max(1.0, limit)):
            status, error = "failed", f"exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        status, error = "timeout", f"stopped after {limit:.0f} s"
    finally:
        _end(process)
    reader.join(5)
    try:
        found = json.loads(out.read_text())
    except (OSError, ValueError):
        found = {"results": {}, "failures": []}
    entry: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1), **found}
    if error:
        entry["error"] = error
        entry["output"] = lines[-_TAIL:]
    return entry


def _environment(home: Path) -> dict[str, str]:
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(home), *filter(None, [env.get("PYTHONPATH")])])
    env["PYTHONUNBUFFERED"] = "1"
    return env


def _end(process: subprocess.Popen[str]) -> None:
    """Also what the stage had started: it leads a process group of its own."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except (ProcessLookupError, PermissionError):
            return
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue


def _follow(process: subprocess.Popen[str], lines: list[str], began: float) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        _say(began, f"   {lines[-1]}")


def _say(began: float, text: str) -> None:
    print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _probe(scratch: Path) -> dict[str, Any]:
    """In a process of its own: this one shall not hold a GPU context while others measure."""
    out = scratch / "probe.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check.child", "probe", "--out", str(out)]
    done = subprocess.run(command, cwd=results.ROOT, capture_output=True, text=True, env=_environment(results.ROOT))
    if done.returncode or not out.exists():
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(out.read_text())


def _clocks() -> dict[str, str]:
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={_NVIDIA_SMI}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        return {}
    values = re.split(r",\s*", done.stdout.strip().splitlines()[0]) if done.returncode == 0 else []
    return dict(zip(_NVIDIA_SMI.split(","), values))
