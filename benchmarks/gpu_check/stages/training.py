"""Steps of adversarial training with each normalisation, eager and compiled, and what normalising costs of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sn_fast
from sn_fast.attacks import pgd

from ... import models
from ...published_loop import apply_published_norm
from ..context import Context
from ..kernels import serve
from ..roofline import layers, used_weights
from ..timing import Timer, digits, ratio

_BATCH, _STEPS = 256, 10
_NAMES = ("ResNet-18, 32x32", "WRN-28-10, 32x32")
_COMPILE = 75.0  # seconds that the compilation of one network, for the attack and for training, may need


def run(context: Context) -> None:
    """PGD-10, l_inf, batch 256, bf16 autocast, channels last, made-up images of CIFAR's size."""
    serve(context)
    networks = context.pick({name: models.NETWORKS[name] for name in _NAMES}, models.TINY)
    trainings = []
    for name, network in networks.items():
        if context.has_time(name, 20.0):
            training = context.attempt(name, lambda n=name, w=network: _Training(context, n, w))  # type: ignore[misc]
            if training:
                trainings.append(training)
                context.attempt(f"{name}, eager", training.eager)
                context.attempt(f"{name}, share", lambda t=training: t.share("eager"))  # type: ignore[misc]
                context.attempt(f"{name}, cuda_graph", training.graphed)
    for training in trainings:  # slow to compile: last
        training.compiled()


def _by_torch(model: nn.Module, _: Tensor) -> nn.Module:
    for m in [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        nn.utils.parametrizations.spectral_norm(m)
    return model


_NORMALISATIONS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "plain": lambda model, _: model,
    "sn_fast": lambda model, example: sn_fast.apply_spectral_norm(model, example),
    "torch": _by_torch,
    "published": apply_published_norm,
}


@dataclass
class _Training:
    """One network, once with each normalisation."""

    context: Context
    name: str
    network: models.Network
    networks: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        context = self.context
        self.batch, self.steps = context.pick((_BATCH, _STEPS), (4, 2))
        self.timer = Timer(context.device, context.pick(6, 2))
        plain = self.network.make().to(device=context.device).to(memory_format=torch.channels_last)
        x = torch.rand(self.batch, 3, *self.network.input_size, device=context.device)
        self.x = x.contiguous(memory_format=torch.channels_last)
        self.y = torch.randint(10, (self.batch,), device=context.device)
        self.networks = {n: make(copy.deepcopy(plain), self.x[:1]) for n, make in _NORMALISATIONS.items()}
        self.record("batch", self.batch)
        self.record("steps", self.steps)
        self.steps_of: dict[str, dict[str, float]] = {}  # of sn_fast, by mode

    def record(self, key: str, value: Any) -> None:
        self.context.record(f"{self.name}/{key}", value)

    def trainer(self, model: nn.Module, update: nn.Module | None = None, **options: Any) -> Callable[[], Tensor]:
        """One step. ``update``: compiled code does not see that a weight has moved; its sigma is advanced here."""
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        attack: dict[str, Any] = {"norm": "inf", "eps": 8 / 255, "steps": self.steps, "clip": (0, 1)} | options

        def step() -> Tensor:
            model.train()
            x_adv = pgd(model, self.x, self.y, autocast_dtype=torch.bfloat16, **attack)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.context.device, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x_adv), self.y)
            loss.backward()
            optimizer.step()
            if update is not None:
                sn_fast.update_spectral_norm(update)
            return loss

        return step

    def compare(self, mode: str, actions: dict[str, Callable[[], Any]]) -> None:
        took = self.timer.on_host(actions)
        entry: dict[str, Any] = {"step": took}
        if "plain" in took:
            entry |= {f"{n}_times_plain": ratio(t, took["plain"]) for n, t in took.items() if n != "plain"}
        self.record(mode, entry)
        if "sn_fast" in took:
            self.steps_of[mode] = took["sn_fast"]
        text = ", ".join(f"{n} {t['median'] / 1000:.1f} ms" for n, t in took.items())
        print(f"{self.name}, {mode}: {text}", flush=True)

    def eager(self) -> None:
        self.compare("eager", {n: self.trainer(m) for n, m in self.networks.items()})

    def compiled(self) -> None:
        """Those whose compilations fit into the time, in the order of their importance."""
        ready: dict[str, Callable[[], Any]] = {}
        for n, model in self.networks.items():
            label = f"{self.name}, compiled, {n}"
            if not self.context.has_time(label, _COMPILE):
                continue
            compiled: Any = torch.compile(model, backend=self.context.pick("inductor", "aot_eager"))
            action = self.trainer(compiled, update=model if n == "sn_fast" else None)
            if self.context.attempt(label, lambda a=action: (a(), True)):  # type: ignore[misc]
                ready[n] = action
        if ready and self.context.has_time(f"{self.name}, compiled", 10.0):
            self.context.attempt(f"{self.name}, compiled", partial(self.compare, "compiled", ready))
            self.share("compiled")

    def share(self, mode: str) -> None:
        """Sigma's refresh, the normalised weights and their gradients, once each: what a step with ``freeze_sn`` needs.

        A share of one per cent is smaller than the spread of whole steps, so that it is timed by itself. On the device
        that is as CUDA graphs, in which every layer's weight has a launch of its own: a little more than in eager code.
        """
        step = self.steps_of.get(mode)
        if step is None:
            return
        model = self.networks["sn_fast"]
        found = layers(model)
        raws = [x.state.raw for x in found]
        grads = [torch.randn_like(r) for r in raws]

        def normalised() -> Any:
            return torch.autograd.grad(used_weights(model, (x.module for x in found)), raws, grads)

        actions: dict[str, Callable[[], Any]] = {"refresh": lambda: sn_fast.update_spectral_norm(model)}
        actions["normalised"] = normalised
        timer = Timer(self.context.device, self.context.repeats)
        host = timer.on_host(actions)
        device = timer.on_device({n: timer.graph(a) for n, a in actions.items()})
        shares = {
            where: digits(sum(t["median"] for t in took.values()) / step["median"])
            for where, took in (("host", host), ("device", device))
        }
        self.record(f"{mode}/sn_share", {"host": host, "device": device, "of_step": shares})
        print(f"{self.name}, {mode}: normalisation is {shares['device']:.2%} of a step", flush=True)

    def graphed(self) -> None:
        """The step with the attack's loop as one CUDA graph."""
        if self.context.rehearse:
            return  # there is nothing to capture
        step = self.trainer(self.networks["sn_fast"], cuda_graph=True)
        took = self.timer.on_host({"graph": step})["graph"]
        entry: dict[str, Any] = {"step": took}
        if "eager" in self.steps_of:
            entry["eager_times_graph"] = ratio(self.steps_of["eager"], took)
        self.record("cuda_graph", entry)
