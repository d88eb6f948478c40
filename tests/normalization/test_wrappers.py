"""Normalised models inside what wraps models: compilers, checkpointing, data parallelism, threads, pruning."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import sn_fast
from sn_fast import update_spectral_norm

from ..process_groups import process_group
from .cases import HOWS, KINDS, full_state, layer_of, made, members, norm_in_use, norm_of, raw_of, same_bits
from .models import X, normalised, true_norms


def write(model: nn.Module, seed: int = 3, size: float = 0.05) -> None:
    """Change all parameters by ``.data``."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data.add_(size * torch.randn(p.shape, generator=generator).to(p.dtype))


def train(model: nn.Module, steps: int = 4, twice: bool = False) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for i in range(steps):
        x = torch.randn(X.shape, generator=torch.Generator().manual_seed(i))
        loss = model(x).square().mean()
        if twice:
            loss = loss + (model(-x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def assert_same_training(model: nn.Module, other: nn.Module, **options) -> None:
    """Losses and states agree up to rounding; ``other`` may wrap a copy of the model."""
    assert train(other, **options) == pytest.approx(train(model, **options), rel=1e-4)
    inner = getattr(other, "_orig_mod", other)
    model(X), other(X)
    for a, b in zip(full_state(model), full_state(inner), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# -- torch.compile ----------------------------------------------------------------------------------------------------


class Counted:
    """A backend that counts its graphs."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.n = 0
        self.backend = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        self.n += 1
        return self.backend(graph, inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "scale"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"gradient": "full"}, marks=pytest.mark.slow),
        pytest.param({"bound": True}, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_needs_no_call(options: dict) -> None:
    torch._dynamo.reset()
    model, backend = normalised(**options), Counted()
    twin = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    assert_same_training(model, twin)
    assert backend.n <= 2  # one for training, one more where the first has specialised
    twin.eval()
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(twin(X), model.eval()(X), rtol=1e-3, atol=1e-4)
        with torch.inference_mode():
            torch.testing.assert_close(twin(X), model.eval()(X), rtol=1e-3, atol=1e-4)
    assert backend.n <= 5
    n = backend.n
    for i in range(4):
        write(twin, i)
        with torch.no_grad():
            twin(X)
    assert backend.n == n  # no write makes it compile again
    bound = options.get("bound")
    for norm in true_norms(twin._orig_mod, raw=False):
        assert norm <= 0.7 * (1 + 1e-6 if bound else 1.02)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_see_data_writes(kind: str) -> None:
    torch._dynamo.reset()
    for how in HOWS:
        model = made(kind, how)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(KINDS[kind].batch()).sum().backward()
        before = full_state(model)
        compiled(KINDS[kind].batch()).sum().backward()
        assert same_bits(full_state(model), before)
        write(model, size=0.01)
        compiled(KINDS[kind].batch()).sum().backward()
        after = full_state(model)
        assert not same_bits(after, before)
        compiled(KINDS[kind].batch())
        assert same_bits(full_state(model), after)
        assert norm_in_use(model, kind) == pytest.approx(1.0, rel=2e-2)
        assert same_bits(full_state(model), after)


@pytest.mark.slow
def test_two_forwards_and_one_backward_by_inductor() -> None:
    torch._dynamo.reset()
    model = normalised(mode="scale")
    twin = torch.compile(copy.deepcopy(model), fullgraph=True)
    assert_same_training(model, twin, twice=True)


def test_two_forwards_and_one_backward_compiled() -> None:
    torch._dynamo.reset()
    model = normalised(mode="scale")
    twin = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    assert_same_training(model, twin, twice=True)


# -- saved programs ---------------------------------------------------------------------------------------------------


def _exported(model: nn.Module, x: Tensor) -> Callable:
    torch._dynamo.reset()  # torch 2.7 exports by Dynamo, which bounds the models of one class
    return torch.export.export(model, (x,)).module()


def _traced(model: nn.Module, x: Tensor) -> Callable:
    return torch.jit.trace(model, x, check_trace=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("save", [_exported, _traced])
@pytest.mark.parametrize("kind", KINDS)
def test_export_and_trace_are_the_model_or_raise(kind: str, save: Callable) -> None:
    for how in HOWS:
        model, x, norms = made(kind, how).eval(), KINDS[kind].batch(), []
        with torch.no_grad():
            torch.testing.assert_close(save(model, x)(x), model(x))
            write(model, size=0.01)
            with contextlib.suppress(Exception):  # "the weights have changed": torch.export wraps what is raised
                saved = save(model, x)
                norm = norm_of(lambda y, f=saved: in_batches(f, y, 3), KINDS[kind].shape)
                norms.append(norm)
            assert norms == pytest.approx([1.0] * len(norms), rel=2e-2)
            model(x)
            torch.testing.assert_close(save(model, x)(x), model(x))


def in_batches(function: Callable, x: Tensor, n: int) -> Tensor:
    """The outputs for all of x, from batches of n, as an exported program takes them."""
    padded = torch.cat([x, x[:1].expand(-len(x) % n, *x.shape[1:])])
    return torch.cat([function(part) for part in padded.split(n)])[: len(x)]


# -- autocast, checkpointing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_moves_the_state_as_without(kind: str) -> None:
    for how in HOWS:
        model = made(kind, how)
        twin = copy.deepcopy(model)
        for m in (model, twin):
            write(m)
        model(KINDS[kind].batch())
        with torch.autocast("cpu", torch.bfloat16):
            twin(KINDS[kind].batch())
            twin(KINDS[kind].batch()).float().sum().backward()
        assert same_bits(full_state(model), full_state(twin))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["whole", "parts"])
def test_checkpointing_after_a_data_write(how: str, reentrant: bool) -> None:
    model = normalised(mode="scale")
    twin = copy.deepcopy(model)
    for m in (model, twin):
        write(m)
    x = X.clone().requires_grad_()

    def run(m: nn.Module, x: Tensor) -> Tensor:
        if how == "whole":
            return checkpoint(m, x, use_reentrant=reentrant)
        for part in m:
            x = checkpoint(part, x, use_reentrant=reentrant)
        return x

    (run(model, x).square().sum() + run(model, -x).sum()).backward()
    (twin(X).square().sum() + twin(-X).sum()).backward()
    assert same_bits(full_state(model), full_state(twin))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


# -- several forwards, teachers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["functional_call", "deepcopy"])
def test_mean_teacher_between_forward_and_backward(teacher: str) -> None:
    model = normalised(mode="scale")
    ema = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    for i in range(3):
        with torch.no_grad():
            for p, q in zip(ema.parameters(), model.parameters(), strict=True):
                p.data.lerp_(q.data, 0.1)
        out = model(X)
        with torch.no_grad():
            given = dict(ema.named_parameters())
            target = functional_call(model, given, (-X,)) if teacher == "functional_call" else ema(-X)
        (out - target - i).square().mean().backward()
        (plain(X) - target - i).square().mean().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            for r in (p, q):
                r.data.sub_(r.grad, alpha=0.1)
                r.grad = None
    model(X), plain(X)
    assert same_bits(full_state(model), full_state(plain))


@pytest.mark.parametrize("kind", KINDS)
def test_ddp_with_two_forwards(kind: str, tmp_path) -> None:
    """D(real) + D(fake), and an adversarial example between: the gradients of the model without DDP."""
    with process_group(tmp_path):
        model = made(kind, "model")
        twin = copy.deepcopy(model)
        ddp = nn.parallel.DistributedDataParallel(model)
        x = KINDS[kind].batch()
        for _ in range(3):
            for m, inner in ((ddp, model), (twin, twin)):
                (torch.relu(1 - m(x)).mean() + torch.relu(1 + m(-x)).mean()).backward()
                clean = m(x)
                z = (x + 0.1).requires_grad_()
                (g,) = torch.autograd.grad(inner(z).square().sum(), z)
                (clean.square().mean() + (m(z.detach() + 0.1 * g.sign()) - clean).square().mean()).backward()
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad)
                for r in (p, q):
                    r.data.sub_(r.grad, alpha=0.01)
                p.data.copy_(q.data)
                p.grad = q.grad = None
        ddp(x), twin(x)
        assert same_bits(full_state(model), full_state(twin))


def replica_of(module: nn.Module) -> nn.Module:
    """As torch.nn.DataParallel makes it: attributes that are no leaves, in place of parameters; copied buffers."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replica_of(child)
    for name, p in module._parameters.items():
        if p is not None:
            setattr(replica, name, p * 1)
    for name, b in module._buffers.items():
        if b is not None:
            replica._buffers[name] = b.clone()
    return replica


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_data_parallel(kind: str) -> None:
    for how in HOWS:
        for change in (None, 0.05, 5.0):
            model, x = made(kind, how), KINDS[kind].batch()
            twin = copy.deepcopy(model)
            for m in (model, twin) if change else ():
                write(m, size=change)
            replicas = [replica_of(model) for _ in range(2)]
            outs = [r(x) for r in replicas]
            expected = twin(x)
            for out in outs:
                torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
            sum(o.square().sum() for o in outs).backward()
            (2 * expected.square().sum()).backward()
            torch.testing.assert_close(raw_of(model).grad, raw_of(twin).grad, rtol=1e-4, atol=1e-5)
            model(x)
            assert same_bits(full_state(model), full_state(twin))


# -- pruning, threads, layers that cannot be read ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_raw_weight_is_trained(kind: str) -> None:
    for how in HOWS:
        model = made(kind, how)
        prune.l1_unstructured(layer_of(model).parametrizations.weight, "original", amount=0.4)
        optimizer = torch.optim.Adam(model.parameters(), 0.002)
        for i in range(10):
            x = KINDS[kind].batch(8, seed=i)
            (model(x) - x.mean()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        x = KINDS[kind].batch()
        model.eval()(x)
        assert norm_of(model, KINDS[kind].shape) == pytest.approx(1.0, rel=2e-2)
        assert int((layer_of(model).weight == 0).sum()) >= int(0.3 * layer_of(model).weight.numel())


@pytest.mark.parametrize("kind", KINDS)
def test_first_forwards_of_four_threads(kind: str) -> None:
    for how in HOWS:
        model = made(kind, how)
        for trial in range(4):
            write(model, trial, 0.1)
            twin, x = copy.deepcopy(model), KINDS[kind].batch()
            write(model, trial + 9, 0.1)
            write(twin, trial + 9, 0.1)
            barrier, outs = threading.Barrier(4), [None] * 4

            def run(i: int, model=model, x=x, barrier=barrier, outs=outs) -> None:
                barrier.wait()
                outs[i] = model(x)

            threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            expected = twin(x)
            assert all(torch.equal(out, expected) for out in outs)
            assert same_bits(full_state(model), full_state(twin))


def test_frozen_deleted_and_meta_layers_do_not_stop_the_others() -> None:
    model = normalised(mode="scale", beta=1.0)
    model[0].requires_grad_(False)
    write(model, size=0.01)
    model(X).sum().backward()
    assert true_norms(model, raw=False) == pytest.approx([1.0] * 4, rel=2e-2)
    model[2].to("meta")
    for p in (*model[0].parameters(), *model[4].parameters()):
        p.data.mul_(3)
    model[0](X)
    update_spectral_norm(model)
    assert len(sn_fast.sigmas(model)) == 3
    assert model.state_dict()["2.bias"].is_meta
    model[2] = nn.Identity()
    write(model)
    model(X).sum().backward()
    assert len(members(model)) == 3
    assert true_norms(model, raw=False) == pytest.approx([1.0] * 3, rel=2e-2)
    del model[1]
    write(model)
    with torch.no_grad():
        model(X)
    assert true_norms(model, raw=False) == pytest.approx([1.0] * 3, rel=2e-2)


# -- slopes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["scale", "cap"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_a_converged_layer(kind: str, mode: str) -> None:
    """Its slope is the exact norm's; the perturbed weights are the own parameter, written without a new version."""
    torch.manual_seed(0)
    layer, shape = {
        "linear": (nn.Linear(3, 4), (3,)),
        "conv": (nn.Conv2d(1, 2, 2), (1, 3, 3)),
        "grouped": (nn.Conv2d(2, 2, 2, groups=2), (2, 3, 3)),
        "transposed": (nn.ConvTranspose2d(1, 2, 2), (1, 2, 2)),
    }[kind]
    layer = layer.double()
    for p in layer.parameters():
        p.data.normal_()
    sn_fast.spectral_norm(layer, input_size=shape[1:] or None, mode=mode, beta=0.8)
    update_spectral_norm(layer, 2000)
    x = torch.randn(2, *shape, dtype=torch.float64)
    weight = layer.parametrizations.weight.original
    for training in (True, False):
        layer.train(training)
        assert torch.autograd.gradcheck(lambda w: layer(x), (weight,), eps=1e-6, atol=1e-5, rtol=1e-3)
        y = x.clone().requires_grad_()
        assert torch.autograd.gradcheck(layer, (y,))
        assert torch.autograd.gradgradcheck(layer, (y,))
