"""The norm of a layer as other packages and as sn_fast give it, side by side: value over truth, and time.

    pip install -e '.[peers]' && python -m benchmarks.peers

It runs without the peers too, and says which are missing.
Every package is called as its users call it, on the CPU, with the same float32 weights.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations

import sn_fast

from .gpu_check import results
from .layers import LAYERS, Layer, truth

PEERS = {"deel-torchlip": "1.0.5", "orthogonium": "0.0.4", "normflows": "1.7.3"}
Run = Callable[[], Any]
_ITERATIONS = 200  # of power iterations that have no stopping rule: what they say is then the method's, not the start's
_BUDGET = 10.0  # seconds for the repetitions of one cell
_FLOAT32, _FLOAT64 = 1e-6, 1e-10  # below the truth by more than this, relative, is too small and no rounding


class NotOffered(Exception):
    """The package has no such layer or option."""


# -- packages: each makes ready, outside the time, what then runs once ------------------------------------------------


def _torch(layer: Layer) -> Run:
    module = copy.deepcopy(layer.module)

    def run() -> float:
        parametrizations.spectral_norm(module, n_power_iterations=_ITERATIONS)
        return layer.divisor(module.weight)  # type: ignore[arg-type]

    return run


def _torchlip(layer: Layer) -> Run:
    """Its layers without the Björck step, after which no one number is left that the weight was divided by."""
    from deel import torchlip

    m = layer.module
    if isinstance(m, nn.Linear):
        made = torchlip.SpectralLinear(m.in_features, m.out_features, bias=False, eps_bjorck=None)
    else:
        kind = torchlip.SpectralConvTranspose2d if isinstance(m, nn.ConvTranspose2d) else torchlip.SpectralConv2d
        made = kind(**_options(m), bias=False, eps_bjorck=None)
    made.parametrizations.weight.original.copy_(layer.weight)

    def run() -> float:
        for _ in range(_ITERATIONS):  # in training, each use of the weight is an iteration
            weight = made.weight
        return layer.divisor(weight)

    return run


def _orthogonium(layer: Layer) -> Run:
    from orthogonium.layers.conv.singular_values import get_conv_sv

    if isinstance(layer.module, nn.Linear):
        raise NotOffered("linear layers")
    size = layer.input_size[0]
    return lambda: get_conv_sv(layer.module, n_iter=4, return_stab_rank=False, imsize=size)


def _normflows(layer: Layer) -> Run:
    """Its tolerance is the one that its documentation calls typical."""
    from normflows.nets import lipschitz

    tolerance = {"atol": 1e-3, "rtol": 1e-3}
    m = layer.module
    if isinstance(m, nn.Linear):
        linear = lipschitz.InducedNormLinear(m.in_features, m.out_features, bias=False, **tolerance)
        linear.weight.copy_(layer.weight)

        def run_linear() -> float:
            linear.compute_weight(update=True)
            return linear.scale

        return run_linear
    options = _options(m)
    for name, usual in (("dilation", 1), ("groups", 1), ("padding_mode", "zeros")):
        if options.pop(name) != usual:
            raise NotOffered(name)
    if isinstance(m, nn.ConvTranspose2d):
        raise NotOffered("transposed convolutions")
    made = lipschitz.InducedNormConv2d(**options, bias=False, **tolerance)
    made.weight.copy_(layer.weight)
    example = torch.zeros(1, *layer.in_shape)

    def run() -> float:
        made(example)
        return made.scale

    return run


def _options(m: nn.Module) -> dict[str, Any]:
    """Of a convolution, whose sizes are the same along both axes."""
    one_per_axis = {name: getattr(m, name)[0] for name in ("kernel_size", "stride", "padding", "dilation")}
    return {name: getattr(m, name) for name in ("in_channels", "out_channels", "groups", "padding_mode")} | one_per_axis


def _sn_fast(measure: Callable[..., Any], **options: Any) -> Callable[[Layer], Run]:
    def make_ready(layer: Layer) -> Run:
        return lambda: measure(sn_fast.operator_of(layer.module, layer.input_size or None), **options)

    return make_ready


@dataclass(frozen=True)
class Candidate:
    """One column. ``slack``: how far below the truth a value may be by rounding alone, relative to it."""

    make_ready: Callable[[Layer], Run]
    says: str
    package: str = ""
    slack: float = _FLOAT32


CANDIDATES: dict[str, Candidate] = {
    "torch": Candidate(_torch, f"parametrizations.spectral_norm, what it divides by after {_ITERATIONS} iterations"),
    "torchlip": Candidate(
        _torchlip,
        f"SpectralConv2d / SpectralConvTranspose2d / SpectralLinear, eps_bjorck=None, what they divide by after "
        f"{_ITERATIONS} iterations",
        "deel-torchlip",
    ),
    "orthogonium": Candidate(_orthogonium, "get_conv_sv(n_iter=4), a bound", "orthogonium"),
    "normflows": Candidate(_normflows, "InducedNormConv2d / InducedNormLinear, tolerance 1e-3", "normflows"),
    "operator_norm": Candidate(_sn_fast(sn_fast.operator_norm), "sn_fast, measured from below"),
    "interval": Candidate(
        _sn_fast(sn_fast.operator_norm_interval), "sn_fast.operator_norm_interval, from below and above", "", _FLOAT64
    ),
    **{
        f"bound {method}": Candidate(
            _sn_fast(sn_fast.operator_norm_bound, method=method),
            f"sn_fast.operator_norm_bound(method={method!r})",
            "",
            _FLOAT64,
        )
        for method in ("auto", "circulant", "fft")
    },
}


# -- measuring --------------------------------------------------------------------------------------------------------


def installed(package: str) -> str | None:
    """The version of a package, if it is there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def value(candidate: Candidate, layer: Layer, true: float) -> dict[str, Any]:
    """One cell: a value and its ratio to the truth; or why there is none."""
    if candidate.package and not installed(candidate.package):
        return {"missing": f"pip install {candidate.package}=={PEERS[candidate.package]}"}
    try:
        found = candidate.make_ready(layer)()
        values = [float(x) for x in found] if isinstance(found, (tuple, list)) else [float(found)]
    except NotOffered as reason:
        return {"not_offered": str(reason)}
    except Exception as error:  # that a peer fails is a result
        return {"error": type(error).__name__, "message": str(error).strip().split("\n")[0][:200]}
    return {
        "value": values if len(values) > 1 else values[0],
        "ratio": [v / true for v in values] if len(values) > 1 else values[0] / true,
        "verdict": verdict(values, true, candidate.slack),
    }


def times(candidates: Mapping[str, Candidate], layer: Layer, repeats: int) -> dict[str, dict[str, Any]]:
    """Of candidates that take turns, each run from a cold start."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            if sum(seconds[name]) < _BUDGET:
                run = candidate.make_ready(layer)
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"min": 1e3 * min(s), "median": 1e3 * statistics.median(s), "repeats": len(s)}
        for name, s in seconds.items()
    }


def verdict(values: Sequence[float], true: float, slack: float) -> str:
    """What is wrong with a value, or with an interval: the weight it divides would keep a norm above one."""
    if not all(map(math.isfinite, values)):
        return "not finite"
    if values[-1] < true * (1 - slack):
        return "too small"
    return "too large" if len(values) > 1 and values[0] > true * (1 + slack) else ""


def run(names: Sequence[str], repeats: int) -> dict[str, Any]:
    """All candidates on the layers of these names."""
    found: dict[str, Any] = {}
    for name in names:
        layer = LAYERS[name]()
        true, how = truth(layer)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            cells = {c: value(candidate, layer, true) for c, candidate in CANDIDATES.items()}
            timed = times({c: x for c, x in CANDIDATES.items() if "value" in cells[c]}, layer, repeats)
        for c, milliseconds in timed.items():
            cells[c]["milliseconds"] = milliseconds
        found[name] = {"truth": true, "by": how, "cells": cells}
        print(f"measured: {name}", flush=True)
    return {
        "machine": machine(),
        "versions": {"sn_fast": sn_fast.__version__, "python": platform.python_version(), "torch": torch.__version__}
        | {name: installed(name) for name in PEERS},
        "commit": results.commit(),
        "candidates": {name: candidate.says for name, candidate in CANDIDATES.items()},
        "layers": found,
    }


def machine() -> dict[str, Any]:
    """The processor: its kind, cores and threads in use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = models[0] if models else platform.processor()
    return {"cpu": model, "cores": cores, "threads": torch.get_num_threads(), "system": platform.system()}


# -- the tables -------------------------------------------------------------------------------------------------------


def tables(found: Mapping[str, Any]) -> str:
    """Markdown: ratios, times, and what went wrong."""
    names, layers = list(found["candidates"]), found["layers"]
    machine, versions = found["machine"], found["versions"]
    head = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads; "
    parts = [head + ", ".join(f"{name} {version}" for name, version in versions.items() if version)]
    for title, cell in (("value / truth", _ratio), ("ms, least / median", _time)):
        rows = [[name, f"{x['truth']:.4f}", *(cell(x["cells"][c]) for c in names)] for name, x in layers.items()]
        parts.append(_markdown([title, "truth", *names], rows))
    notes = [f"- {name}: {says}" for name, says in found["candidates"].items()]
    missing = {c: x["missing"] for cells in layers.values() for c, x in cells["cells"].items() if "missing" in x}
    notes += [f"- {name} is not installed: {command}" for name, command in missing.items()]
    for name, x in layers.items():
        for c, cell in x["cells"].items():
            if "error" in cell:
                notes.append(f"- {c}, {name}: {cell['error']}: {cell['message']}")
    return "\n\n".join([*parts, "\n".join(notes)])


def _ratio(cell: Mapping[str, Any]) -> str:
    if "missing" in cell:
        return "not installed"
    if "not_offered" in cell:
        return f"no {cell['not_offered']}"
    if "error" in cell:
        return cell["error"]
    ratios = cell["ratio"] if isinstance(cell["ratio"], list) else [cell["ratio"]]
    return " .. ".join(map(_near_one, ratios)) + (f" {cell['verdict']}" if cell["verdict"] else "")


def _near_one(ratio: float) -> str:
    off = ratio - 1
    return f"{ratio:.4f}" if abs(off) >= 1e-3 or not off else f"1 {'-' if off < 0 else '+'} {abs(off):.0e}"


def _time(cell: Mapping[str, Any]) -> str:
    found = cell.get("milliseconds")
    return f"{_three(found['min'])} / {_three(found['median'])}" if found else ""


def _three(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * w for w in widths], *rows]
    return "\n".join("| " + " | ".join(x.ljust(w) for x, w in zip(line, widths)) + " |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=results.FOLDER / "peers_cpu.json", help="where the results go")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs per cell, at most (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS), metavar="NAME")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found = run(options.layers, options.repeats)
    results.write(options.out, found)
    print(tables(found))


if __name__ == "__main__":
    main()
