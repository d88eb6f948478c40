"""That the operators are right on this GPU: values, opcheck, graphs, streams, and the same bits on every repeat."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import sn_fast
from sn_fast.attacks import pgd_step

from ... import models
from ..cases import Case, all_cases, kernel_names, tensors
from ..context import Context
from ..kernels import serve
from ..roofline import layers, power_arguments, used_weights
from ..timing import Timer


def run(context: Context) -> None:
    """Every check on its own: one that fails leaves the others."""
    serve(context)
    cases = all_cases(context.device, small=context.rehearse)
    if context.rehearse:
        cases = [c for c in cases if c.name.endswith(("float32 weights, fp32", "float32, on chip", "float32, 3x3"))]
    context.attempt("values", lambda: _values(context, cases))
    context.attempt("kernels", lambda: _kernels(context, cases))
    context.attempt("repeats", lambda: _repeats(context, cases))
    network = next(iter(context.pick(models.NETWORKS, models.TINY).values()))
    model = network.make().to(context.device)
    sn_fast.apply_spectral_norm(model, network.example().to(context.device))
    for name, check in _GRAPHS.items():
        context.attempt(name, lambda c=check: c(context, model))  # type: ignore[misc]
    context.attempt("streams", lambda: _streams(context, model))
    for case in [c for c in cases if c.opcheck]:
        if context.has_time(f"opcheck: {case.name}", 4.0):
            context.attempt(f"opcheck: {case.name}", lambda c=case: _opcheck(context, c))  # type: ignore[misc]


def _values(context: Context, cases: Sequence[Case]) -> None:
    """Against float64, with NaN in all new memory: an element that nothing wrote is an error, whatever was there."""
    errors = {}
    with _poisoned_memory():
        for case in cases:
            error = context.attempt(case.name, lambda c=case: c.error(c.run()))  # type: ignore[misc]
            errors[case.name] = error
            if error is not None and not error <= case.tolerance:
                context.fail(f"{case.name}: error {error:.2e}, allowed {case.tolerance:.2e}")
    context.record("errors", errors)
    print(f"values: {len(errors)} cases", flush=True)


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # with it, torch.empty fills what it returns
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _kernels(context: Context, cases: Sequence[Case]) -> None:
    """Which kernels the cases start: all that there are."""
    if context.rehearse:
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for case in cases:
            case.run()
        torch.cuda.synchronize()
    started = " ".join(event.key for event in profile.key_averages())
    missing = sorted(name for name in kernel_names() if name not in started)
    context.record("kernels_not_started", missing)
    if missing:
        context.fail(f"never started: {', '.join(missing)}")


def _repeats(context: Context, cases: Sequence[Case]) -> None:
    """The same bits every time: the calls follow one another in a graph, and differences are counted on the device."""
    rounds, calls = context.pick((100 if context.quick else 1000, 10), (2, 1))
    timer = Timer(context.device, 1)
    for case in cases:
        if not ("float32" in case.name and context.has_time(f"repeats: {case.name}", 3.0)):
            continue
        first = [t.clone() for t in case.run()]
        different = torch.zeros((), dtype=torch.int64, device=context.device)

        def compare(case: Case = case, first: Sequence[Tensor] = first, different: Tensor = different) -> None:
            for a, b in zip(case.run(), first, strict=True):
                different.add_((a != b).any())

        replay = timer.graph(compare, calls)
        for _ in range(rounds):
            replay()
        count = int(different)
        if count:
            context.fail(f"{case.name}: other bits in {count} results of {rounds * calls} repeats")
        context.record(f"repeats/{case.name}", {"times": rounds * calls, "different": count})
    print(f"repeats: {rounds * calls} each", flush=True)


def _opcheck(context: Context, case: Case) -> None:
    outcome = torch.library.opcheck(case.op, case.args)
    context.record(f"opcheck/{case.name}", outcome)
    print(f"opcheck: {case.name}", flush=True)


# -- CUDA graphs ------------------------------------------------------------------------------------------------------


def _same(context: Context, name: str, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    equal = all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    context.record(f"graphs/{name}", equal)
    print(f"graph: {name}: {'equal to eager' if equal else 'DIFFERENT'}", flush=True)
    if not equal:
        context.fail(f"graph of {name}: other bits than eager")


def _graph_of_update(context: Context, model: nn.Module) -> None:
    """Replays advance the state as eager calls do."""
    twin = copy.deepcopy(model)
    replay = Timer(context.device, 1).graph(lambda: sn_fast.update_spectral_norm(model))
    # Capturing ran the update a few times: start both from the same state.
    for a, b in zip(layers(model), layers(twin)):
        a.state.u.copy_(b.state.u)
        a.state.v.copy_(b.state.v)
    for _ in range(3):
        replay()
        sn_fast.update_spectral_norm(twin)
    found, wanted = ([t for x in layers(m) for t in (x.state.u, x.state.v, x.state.sigma)] for m in (model, twin))
    _same(context, "update_spectral_norm", found, wanted)


def _graph_of_normalised_weights(context: Context, model: nn.Module) -> None:
    raws = [x.state.raw for x in layers(model)]
    grads = [torch.randn_like(r) for r in raws]
    results: list[list[Tensor]] = []

    def forward_backward() -> None:
        weights = used_weights(model, (x.module for x in layers(model)))
        results[:] = [[w.detach() for w in weights], list(torch.autograd.grad(weights, raws, grads))]

    forward_backward()
    eager = [t.clone() for part in results for t in part]
    replay = Timer(context.device, 1).graph(forward_backward)
    for t in (t for part in results for t in part):  # the graph's own: it writes them anew
        t.zero_()
    replay()
    _same(context, "normalised weights and their gradients", [t for part in results for t in part], eager)


def _graph_of_pgd_step(context: Context, _: nn.Module) -> None:
    for norm in ("inf", 2, 1, "L1-exact"):
        x_adv, x, grad = torch.rand(3, 4, 3, *context.pick((224, 224), (8, 8)), device=context.device)
        result: list[Tensor] = []

        def step(norm: Any = norm, a: Tensor = x_adv, b: Tensor = x, g: Tensor = grad, kept: list = result) -> None:
            kept[:] = [pgd_step(a, b, g, norm=norm, eps=0.03, alpha=0.01, clip=(0, 1))]

        replay = Timer(context.device, 1).graph(step)
        grad.copy_(torch.randn_like(grad))  # new inputs in the same memory
        replay()
        eager = pgd_step(x_adv, x, grad, norm=norm, eps=0.03, alpha=0.01, clip=(0, 1))
        _same(context, f"pgd_step {norm}", result, [eager])
        if context.rehearse:
            return


_GRAPHS: dict[str, Callable[[Context, nn.Module], None]] = {
    "graph of update_spectral_norm": _graph_of_update,
    "graph of normalised weights": _graph_of_normalised_weights,
    "graph of pgd_step": _graph_of_pgd_step,
}


# -- streams ----------------------------------------------------------------------------------------------------------


def _streams(context: Context, model: nn.Module) -> None:
    """Two at once, each with its own tensors, give what each gives alone."""
    if context.rehearse:
        return
    op = torch.ops.sn_fast.power_step.default
    jobs = []
    for half in (layers(model)[::2], layers(model)[1::2]):
        weights, us, vs, code = power_arguments(half)
        jobs.append((weights, us, vs, code, 3, "fp32"))
    alone = [tensors(op(*job)) for job in jobs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in jobs]
    different = torch.zeros(len(jobs), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    for _ in range(50):
        for i, (job, stream) in enumerate(zip(jobs, streams)):
            with torch.cuda.stream(stream):
                for a, b in zip(tensors(op(*job)), alone[i]):
                    different[i] += (a != b).any()
    torch.cuda.synchronize()
    context.record("streams_different", different.tolist())
    print(f"two streams: {different.tolist()} results differ", flush=True)
    if different.any():
        context.fail(f"two streams at once: {different.tolist()} results with other bits")
