"""Power iteration and normalisation of whole networks: right first, then how fast, and where the time goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.ops.power_step import power_step as power_step_op
from sn_fast.ops.precision import PRECISIONS

from ... import models
from ...published_loop import PublishedLoop
from ..context import Context
from ..kernels import serve
from ..roofline import Layer, layers, power_arguments, random_unit, total, used_weights, work
from ..timing import Action, Timer, digits, ratio
from .peaks import known

# Of sigma, u and v after one iteration from random vectors, relative, against float64.
_ALLOWED = {"fp32": 5e-6, "3xtf32": 1e-5, "tf32": 3e-3, "bf16": 3e-2}
_COMPILE = 45.0  # seconds that torch.compile of the published loop may need


def run(context: Context) -> None:
    """All networks; the slow compilations last."""
    serve(context)
    networks = context.pick(models.NETWORKS, models.TINY)
    if context.quick:
        networks = dict(list(networks.items())[:1])
    peaks, timer = known(context), Timer(context.device, context.repeats)
    measured: dict[str, _Measured] = {}
    for name, network in networks.items():
        if context.has_time(name, 10.0):
            found = context.attempt(name, lambda n=name, w=network: _Measured(context, timer, peaks, n, w))  # type: ignore[misc]
            if found:
                measured[name] = found
                for part in (found.correctness, found.sn_fast, found.peers, found.single_layers):
                    context.attempt(f"{name}, {part.__name__}", part)
    for name, found in measured.items():
        if context.has_time(f"{name}, torch.compile", _COMPILE):
            context.attempt(f"{name}, torch.compile", found.compiled)


class _Measured:
    """One network."""

    def __init__(
        self, context: Context, timer: Timer, peaks: dict[str, float], name: str, network: models.Network
    ) -> None:
        self.context, self.timer, self.peaks, self.name = context, timer, peaks, name
        torch.manual_seed(0)
        example = network.example().to(context.device)
        self.plain = network.make().to(context.device)
        self.model = sn_fast.apply_spectral_norm(copy.deepcopy(self.plain), example)
        self.layers = layers(self.model)
        self.loop = PublishedLoop(self.plain, example)
        self.work = total([work(x.weight, x.geometry) for x in self.layers])
        self.record("layers", len(self.layers))
        self.record("bytes", self.work.bytes)
        self.record("multiply_adds", self.work.multiply_adds)
        self.right: set[str] = set()
        self.refresh_graph: dict[str, float] | None = None

    def record(self, key: str, value: Any) -> None:
        self.context.record(f"{self.name}/{key}", value)

    def set_precision(self, precision: str) -> None:
        for layer in self.layers:
            layer.state.options = replace(layer.state.options, precision=precision)

    # -- right? -------------------------------------------------------------------------------------------------------

    def correctness(self) -> None:
        """One iteration from random vectors, every layer, every precision, against the reference in float64."""
        weights, us, vs, code = power_arguments(self.layers)
        us, vs = [random_unit(u) for u in us], [random_unit(v) for v in vs]
        exact = power_step_op(_double(weights), _double(us), _double(vs), code, 1)
        for precision in PRECISIONS:
            found = power_step_op(weights, us, vs, code, 1, precision)
            worst = {
                part: max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found[i], exact[i], strict=True))
                for i, part in enumerate(("u", "v", "sigma"))
            }
            self.record(f"{precision}/error", worst)
            if all(error <= _ALLOWED[precision] for error in worst.values()):
                self.right.add(precision)
            else:
                self.context.fail(f"{self.name}, {precision}: errors {worst}, allowed {_ALLOWED[precision]}; not timed")

    # -- sn_fast ------------------------------------------------------------------------------------------------------

    def sn_fast(self) -> None:
        """The refresh in every precision, on the device alone (a graph) and as called; then the normalised weights."""
        arguments = power_arguments(self.layers)
        kernels, updates = {}, {}
        for precision in PRECISIONS:
            if precision in self.right:
                self.set_precision(precision)
                kernels[precision] = self.timer.graph(partial(power_step_op, *arguments, 1, precision))
                updates[precision] = self.timer.graph(self.refresh)
        for precision, took in self.timer.on_device(kernels).items() if kernels else ():
            floors = self.work.floors(self.peaks, precision)
            result = {"time": took, "floors": floors, "times_larger_floor": digits(took["median"] / floors["larger"])}
            self.record(f"{precision}/power_step", result)
            print(f"{self.name}, {precision}: {took['median']:.0f} us, floor {floors['larger']:.0f}", flush=True)
        for precision, took in self.timer.on_device(updates).items() if updates else ():
            self.record(f"{precision}/update_graph", took)
            if precision == "fp32":
                self.refresh_graph = took
        self.set_precision("fp32")
        self.record("fp32/update_host", self.timer.on_host({"refresh": self.refresh})["refresh"])
        self.record("normalise", self.normalised(self.model, [x.module for x in self.layers]))

    def refresh(self) -> None:
        sn_fast.update_spectral_norm(self.model)

    def normalised(self, model: nn.Module, modules: Sequence[nn.Module]) -> dict[str, Any]:
        """The weights in use, and their gradients, of every layer."""
        raws = [m.parametrizations["weight"].original for m in modules]  # type: ignore[index, union-attr]
        grads = [torch.randn_like(r) for r in raws]

        def forward() -> Any:
            with torch.no_grad():
                return used_weights(model, modules)

        def both() -> Any:
            return torch.autograd.grad(used_weights(model, modules), raws, grads)

        graphs = {"forward": self.timer.graph(forward), "forward_backward": self.timer.graph(both)}
        host = self.timer.on_host({"forward": forward, "forward_backward": both})
        return {"graph": self.timer.on_device(graphs), "host": host}

    # -- what it is compared with -------------------------------------------------------------------------------------

    def peers(self) -> None:
        """The published loop, eager and as a graph, exact and (as cuDNN does by default) in tf32; torch's own."""
        for label, tf32 in (("published", False), ("published_tf32", True)):
            torch.backends.cudnn.allow_tf32 = tf32
            try:
                graph = self.timer.graph(self.loop.refresh)
                actions: dict[str, Callable[[], Any]] = {label: self.loop.refresh, "sn_fast": self.refresh}
                host = self.timer.on_host(actions)
                device = self.timer.on_device({label: graph})[label]
            finally:
                torch.backends.cudnn.allow_tf32 = False
            entry: dict[str, Any] = {"host": host[label], "graph": device}
            entry["host_times_sn_fast"] = ratio(host[label], host["sn_fast"])
            if self.refresh_graph:
                entry["graph_times_sn_fast"] = ratio(device, self.refresh_graph)
            self.record(f"peers/{label}", entry)
            print(
                f"{self.name}, {label}: {host[label]['median']:.0f} us eager, {device['median']:.0f} graph", flush=True
            )
        self.record("peers/published_normalise", self.context.attempt("published normalise", self.published_normalise))
        theirs = copy.deepcopy(self.plain)
        modules = [m for m in theirs.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        for m in modules:
            nn.utils.parametrizations.spectral_norm(m)
        # In training mode each use of a weight runs a power iteration (of the reshaped kernel: a cheaper, other norm).
        self.record(
            "peers/torch",
            self.context.attempt("torch's spectral_norm", lambda: self.normalised(theirs.train(), modules)),
        )

    def published_normalise(self) -> dict[str, Any]:
        """Forward with its iteration, and backward through it."""
        weights = [w.clone().requires_grad_() for w in self.loop.weights]
        grads = [torch.randn_like(w) for w in weights]

        def forward() -> Any:
            with torch.no_grad():
                return self.loop.normalise(weights)

        def both() -> Any:
            return torch.autograd.grad(self.loop.normalise(weights), weights, grads)

        return self.timer.on_host({"forward": forward, "forward_backward": both})

    def compiled(self) -> None:
        """The published loop under torch.compile."""
        iterate = torch.compile(self.loop.iterate, backend=self.context.pick("inductor", "aot_eager"))

        @torch.no_grad()
        def refresh() -> Any:
            return iterate(self.loop.weights, self.loop.us)

        host = self.timer.on_host({"compiled": refresh, "sn_fast": self.refresh})
        entry: dict[str, Any] = {"host": host["compiled"]}
        entry["host_times_sn_fast"] = ratio(host["compiled"], host["sn_fast"])
        if self.refresh_graph:
            entry["graph"] = self.timer.on_device({"compiled": self.timer.graph(refresh)})["compiled"]
            entry["graph_times_sn_fast"] = ratio(entry["graph"], self.refresh_graph)
        self.record("peers/published_compiled", entry)
        print(f"{self.name}, compiled: {host['compiled']['median']:.0f} us", flush=True)

    # -- where the time goes ------------------------------------------------------------------------------------------

    def single_layers(self) -> None:
        """Each layer alone, in fp32, and its own floor; those that lose most come first."""
        if "fp32" not in self.right:
            return
        graphs: dict[str, Action] = {}
        alike: dict[str, Layer] = {}
        count: dict[str, int] = {}
        for layer in self.layers:
            key = _key(layer)
            count[key] = count.get(key, 0) + 1
            if key not in alike:
                alike[key] = layer
                graphs[key] = self.timer.graph(partial(power_step_op, *power_arguments([layer]), 1))
        rows = []
        for key, took in self.timer.on_device(graphs).items():
            floor = work(alike[key].weight, alike[key].geometry).floors(self.peaks, "fp32")["larger"]
            row = {"layer": key, "first": alike[key].name, "alike": count[key], "time": took["median"], "floor": floor}
            rows.append(row | {"lost": round((took["median"] - floor) * count[key], 2)})
        rows.sort(key=lambda row: -row["lost"])
        self.record("single_layers", rows)
        for row in rows[:3]:
            print(
                f"{self.name}: {row['alike']} x {row['layer']}: {row['time']:.1f} us, floor {row['floor']:.1f}",
                flush=True,
            )


def _double(ts: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() for t in ts]


def _key(layer: Layer) -> str:
    """Layers of one key are one measurement."""
    axes = layer.geometry.axes
    shape = "x".join(map(str, layer.weight.shape))
    if not axes:
        return f"matrix {shape}"
    return f"{shape}, stride {axes[0].stride}, at {'x'.join(str(a.size) for a in axes)}"
