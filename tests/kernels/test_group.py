"""Whole models with kernels: all layers are normalised in one launch, and no layer ever sees a stale weight."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sn_fast import apply_spectral_norm, frozen_sigma, remove_spectral_norm, sigmas, spectral_norm, update_spectral_norm
from sn_fast.ops import library
from sn_fast.spectral import group as groups
from sn_fast.spectral.parametrization import SpectralNorm

from ..on_device import DEVICE
from ..spectral import models
from ..spectral.models import X, network, states, step, unchanged

pytestmark = pytest.mark.usefixtures("kernels")


class Calls(TorchDispatchMode):
    """Counts calls of the operators; of normalize, the weights of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.normalize: list[int] = []
        self.backward = self.power = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.sn_fast.normalize.default:
            self.normalize.append(len(args[0]))
        self.backward += func is torch.ops.sn_fast.normalize_backward.default
        self.power += func is torch.ops.sn_fast.power_step.default
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def plain_pytorch() -> Iterator[None]:
    """As if there were no kernels."""
    served = library._SERVED[DEVICE.type]
    served._runs = False
    try:
        yield
    finally:
        served._runs = True


def normalised(beta: float = 0.5, **options: Any) -> nn.Sequential:
    """beta is a power of two: only then is PyTorch's sigma / beta on a GPU, a product, the same number."""
    with plain_pytorch():  # the start is not what is tested, and slow where kernels are emulated
        return models.normalised(beta=beta, **options)


def layers(model: nn.Module) -> list[SpectralNorm]:
    return [m for m in model.modules() if isinstance(m, SpectralNorm)]


def ready(model: nn.Module) -> int:
    """Normalised weights that wait for their layers."""
    return len(layers(model)[0]._group._ready)


def agree(model: nn.Module, *inputs: Tensor) -> Tensor:
    """The model's output, which must be, bit by bit, what plain PyTorch makes of the same u, v and sigma."""
    out = model(*inputs or (X,))
    before = states(model)
    with plain_pytorch():
        assert torch.equal(out, model(*inputs or (X,)))
    assert unchanged(model, before)
    return out


def leave_ready(model: nn.Sequential) -> None:
    """Use the last layer alone: the others' normalised weights stay behind, for whoever comes next."""
    assert model[-1].weight is not None
    assert ready(model) == len(layers(model)) - 1


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-4) -> None:
    for x, y in zip(a, b, strict=True):
        assert float((x - y).norm()) <= tolerance * float(y.norm()) + 1e-12


class Chosen(nn.Module):
    """Applies the layers that one names, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(6, 6) for name in "abc"})

    def forward(self, x: Tensor, names: str = "abc") -> Tensor:
        for name in names:
            x = torch.tanh(self.layers[name](x))
        return x


# -- one launch -------------------------------------------------------------------------------------------------------


def test_one_call_per_forward_and_nothing_is_kept() -> None:
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        with Calls() as calls:
            model(X)
            assert calls.normalize == [4]
            assert ready(model) == 0
            loss = model.train()(X).square().mean()
            assert calls.normalize == [4, 4]
            optimizer.zero_grad()
            loss.backward()
            assert (calls.normalize, calls.backward) == ([4, 4], 4)
            assert ready(model) == 0
            optimizer.step()
            assert calls.power == 0
            with torch.no_grad():
                model.eval()(X)
            assert (calls.normalize, calls.power) == ([4] * 3, 1)
            assert ready(model) == 0


def test_layers_of_every_kind_in_one_call() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="replicate"),
        nn.Conv2d(4, 4, (7, 1)),
        nn.Flatten(),
        nn.Linear(28, 5, bias=False),
    )
    for operator in ("conv", "reshape"):
        twin = apply_spectral_norm(copy.deepcopy(model), X[:1], beta=0.25, operator=operator, mode="scale")
        with Calls() as calls:
            agree(twin)
        assert calls.normalize[0] == 5
        twin(X).square().sum().backward()
        found = gradients(twin)
        twin.zero_grad()
        with plain_pytorch():
            twin(X).square().sum().backward()
        assert_close(found, gradients(twin), 1e-5)


def test_without_kernels_each_layer_computes_its_own() -> None:
    """What is computed before it is needed takes memory, and there is no launch to save."""
    model = normalised()
    with Calls() as calls, plain_pytorch():
        model(X)
    assert calls.normalize == [1, 1, 1, 1]
    assert ready(model) == 0


def test_models_do_not_mix() -> None:
    first, second = normalised(), normalised(beta=0.125)
    with Calls() as calls:
        nn.Sequential(first[0], second[0])[0](X)
        second(X)
    assert calls.normalize == [4, 4]
    agree(first)
    agree(second)


def test_options_of_layers_are_their_own() -> None:
    """beta by layer; and a layer whose gradient is full takes no part."""
    model = apply_spectral_norm(network(), X[:1], beta={"^0": 0.25, "^2": 128.0, ".": 0.5})
    with Calls() as calls:
        agree(model)
    assert calls.normalize[0] == 4
    full = normalised(gradient="full")
    with Calls() as calls:
        agree(full)
    assert (calls.normalize, ready(full)) == ([], 0)


def test_torchs_own_cache_of_parametrizations() -> None:
    model = normalised()
    expected = agree(model)
    with Calls() as calls, parametrize.cached():
        for _ in range(3):
            assert torch.equal(model(X), expected)
    assert calls.normalize == [4]
    assert ready(model) == 0


# -- never a stale weight ---------------------------------------------------------------------------------------------


def optimizer_step(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Sequential], None]:
    return lambda model: kind(model.parameters(), lr=0.05, **options).step()  # type: ignore[call-arg]


def moved(p: Tensor) -> Tensor:
    """Another weight, of another direction too."""
    return 1.2 * p.detach() + 0.2 * torch.randn_like(p)


@torch.no_grad()
def move_in_place(model: nn.Module) -> None:
    for p in model.parameters():
        p.copy_(moved(p))


def write_through_data_and_update(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.copy_(moved(p))
    update_spectral_norm(model)


def replace_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = moved(p)


def replace_parameters(model: nn.Module) -> None:
    for m in layers(model):
        m.module.parametrizations.weight.original = nn.Parameter(moved(m.raw))  # type: ignore[union-attr]


def assign_weights(model: nn.Module) -> None:
    for m in layers(model):
        m.module.weight = moved(m.raw)


def swap_data(model: nn.Module) -> None:
    """Every layer's weight for another's memory, of the same age."""
    others = copy.deepcopy(model)
    move_in_place(others)
    for p, q in zip(model.parameters(), others.parameters()):
        p.data, q.data = q.data, p.data


def load_others_state(model: nn.Module) -> None:
    other = normalised()
    move_in_place(other)
    model.load_state_dict(other.state_dict())


def load_by_assignment(model: nn.Module) -> None:
    other = normalised()
    move_in_place(other)
    model.load_state_dict(other.state_dict(), assign=True)


def write_sigma(model: nn.Module) -> None:
    for m in layers(model):
        m.sigma.mul_(2.0)


def replace_sigma(model: nn.Module) -> None:
    """By another, as often written."""
    for m in layers(model):
        sigma, version = m.sigma * 2.0, m.sigma._version
        while sigma._version < version:
            sigma.mul_(1.0)
        m.sigma = sigma


def step_with_a_hook(model: nn.Module) -> None:
    """Fused optimizers write without a new version."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=True)
    optimizer.register_step_post_hook(lambda *_: update_spectral_norm(model))
    optimizer.step()


CHANGES: dict[str, Callable[[nn.Sequential], None]] = {
    "sgd": optimizer_step(torch.optim.SGD, foreach=False),
    "sgd_foreach": optimizer_step(torch.optim.SGD, foreach=True),
    "sgd_fused": optimizer_step(torch.optim.SGD, fused=True),
    "sgd_momentum_fused": optimizer_step(torch.optim.SGD, fused=True, momentum=0.9),
    "adam_foreach": optimizer_step(torch.optim.Adam, foreach=True),
    "adamw_fused": optimizer_step(torch.optim.AdamW, fused=True),
    "fused_with_a_hook": step_with_a_hook,
    "in_place": move_in_place,
    "data_and_update": write_through_data_and_update,
    "replaced_data": replace_data,
    "swapped_data": swap_data,
    "replaced_parameters": replace_parameters,
    "assigned_weights": assign_weights,
    "load_state_dict": load_others_state,
    "load_by_assignment": load_by_assignment,
    "sigma_written": write_sigma,
    "sigma_replaced": replace_sigma,
    "update": lambda model: update_spectral_norm(model, 3),
    "initialised": lambda model: [nn.init.normal_(m.raw) for m in layers(model)],  # type: ignore[list-item, return-value]
}
MOVES: dict[str, Callable[[nn.Sequential], Any]] = {
    "float64": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "to_half_and_back": lambda model: model.half().float(),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "requires_grad": lambda model: model.requires_grad_(False),
    "eval": lambda model: model.eval(),
    "copied": copy.deepcopy,
    "saved": lambda model: model.state_dict(),
    "sigmas": sigmas,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["after_a_whole_forward", "while_weights_are_ready"])
def test_a_change_is_seen(change: str, when: str) -> None:
    model = normalised()
    before = agree(model)
    before.square().mean().backward()
    if when == "while_weights_are_ready":
        leave_ready(model)
    CHANGES[change](model)
    with Calls() as calls:
        after = agree(model)
    assert calls.normalize[0] == 4
    assert ready(model) == 0
    if change != "update":
        assert not torch.allclose(after, before, rtol=1e-3, atol=1e-4)
    after.square().mean().backward()
    assert all(bool(g.isfinite().all()) for g in gradients(model))


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("when", ["after_a_whole_forward", "while_weights_are_ready"])
def test_what_is_no_change_makes_none(move: str, when: str) -> None:
    model = normalised()
    before = agree(model)
    if when == "while_weights_are_ready":
        leave_ready(model)
    MOVES[move](model)
    dtype = model[0].weight.dtype
    torch.testing.assert_close(agree(model, X.to(dtype)).float(), before, rtol=0.05, atol=0.05)


def test_a_change_in_the_middle_of_a_forward() -> None:
    """Of the weight of a layer to come, of its sigma, and of a layer that was used already."""
    for change in (move_in_place, write_sigma):
        model = normalised()
        agree(model)
        hook = model[2].register_forward_hook(lambda *_, model=model, change=change: change(model[4:]))
        found = model(X)
        hook.remove()
        with plain_pytorch():
            assert torch.equal(found, model(X))
        model = normalised()
        agree(model)
        hook = model[4].register_forward_hook(lambda *_, model=model, change=change: change(model[:2]))
        model(X)
        hook.remove()
        agree(model)


def test_a_weight_transposed_in_place() -> None:
    """Its memory and version stay."""
    x = torch.randn(4, 6)
    model = apply_spectral_norm(Chosen(), x, beta=0.5)
    model(x, "c")  # the others are ready
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.T
    found = model(x)
    with plain_pytorch():
        assert torch.equal(found, model(x))


def test_another_weight_than_the_layers_own() -> None:
    """A parametrization called on a parameter of one's own."""
    model = normalised()
    member = layers(model)[-1]
    other = nn.Parameter(moved(member.raw))
    leave_ready(model)
    found = member(other)
    with plain_pytorch():
        assert torch.equal(found, member(other))
    assert ready(model) == 3


def test_ready_weights_serve_the_next_use_if_nothing_has_changed() -> None:
    model = normalised()
    expected = agree(model)
    leave_ready(model)
    with Calls() as calls:
        assert torch.equal(model(X), expected)
    assert calls.normalize == [4]  # at the last layer, whose weight was used


def test_a_layer_used_twice_or_skipped() -> None:
    x = torch.randn(4, 6)
    model = apply_spectral_norm(Chosen(), x, beta=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for names in ("abbc", "abc", "ac", "c", "abbbc", "b", "ba", "cba", "abab", "abc"):
        found = model(x, names)
        with plain_pytorch():
            assert torch.equal(found, model(x, names))
        optimizer.zero_grad()
        found.square().mean().backward()
        used = gradients(model)
        optimizer.zero_grad()
        with plain_pytorch():
            model(x, names).square().mean().backward()
        assert_close(used, gradients(model), 1e-5)
        optimizer.step()
    model(x)
    assert ready(model) == 0


def test_frozen_sigma() -> None:
    model = normalised()
    expected = agree(model)
    with Calls() as calls, frozen_sigma(model):
        for _ in range(3):
            assert torch.equal(model(X), expected)
        with frozen_sigma(model):
            model(X)
    assert calls.normalize == [4]
    with frozen_sigma(model):
        move_in_place(model)
        kept = model[0].weight
        model(X)
        assert model[0].weight is kept
    assert ready(model) == 0
    agree(model)
    with frozen_sigma(model[:3]):  # a part: the others are computed without it
        move_in_place(model)
        with Calls() as calls:
            model(X)
        assert calls.normalize == [2]
    agree(model)
    with frozen_sigma(model), contextlib.suppress(KeyError):
        raise KeyError
    agree(model)


def test_a_copy_has_a_group_of_its_own() -> None:
    model = normalised()
    leave_ready(model)
    twin = copy.deepcopy(model)
    assert (ready(model), ready(twin)) == (3, 0)
    move_in_place(twin)
    expected = agree(model)
    assert not torch.equal(agree(twin), expected)
    with Calls() as calls:
        model(X)
        twin(X)
    assert calls.normalize == [4, 4]


def test_a_saved_state_continues_bit_by_bit() -> None:
    model = normalised()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step(model, X, optimizer)
    leave_ready(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = normalised()
    leave_ready(twin)
    twin.load_state_dict(torch.load(file))
    assert torch.equal(agree(twin), agree(model))
    for m in (model, twin):
        step(m, X, torch.optim.SGD(m.parameters(), 0.1))
    assert torch.equal(agree(twin), agree(model))


def test_removal_in_the_middle() -> None:
    model = normalised()
    expected = agree(model)
    leave_ready(model)
    remove_spectral_norm(model[2])
    torch.testing.assert_close(agree(model), expected)
    with Calls() as calls:
        model(X)
    assert calls.normalize == [3]
    leave_ready(model)
    remove_spectral_norm(model)
    torch.testing.assert_close(model(X), expected)


def test_layers_with_groups_of_their_own() -> None:
    model = network()
    for layer, size in ((model[0], (8, 8)), (model[2], None), (model[7], None)):
        spectral_norm(layer, input_size=size, beta=0.25)
    for _ in range(2):
        with Calls() as calls:
            model(X)
        assert calls.normalize == [1, 1, 1]
    agree(model)


def test_tied_weights() -> None:
    a, b, c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
    b.weight = a.weight
    model = apply_spectral_norm(nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), c), torch.randn(1, 5), beta=0.5)
    x = torch.randn(3, 5)
    with Calls() as calls:
        agree(model, x)
    assert calls.normalize[0] == 3
    leave_ready(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model(x).sum().backward()
    leave_ready(model)
    optimizer.step()
    agree(model, x)
    assert torch.equal(model[0].weight, model[2].weight)


class Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


def test_members_of_several_dtypes() -> None:
    """float64 among them, which the kernels leave to plain PyTorch."""
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32
    model = nn.Sequential(*(m for d in dtypes for m in (Cast(d), nn.Linear(6, 6).to(d))))
    apply_spectral_norm(model, torch.randn(1, 6), beta=0.25)
    with Calls() as calls:
        agree(model, torch.randn(4, 6)).sum().backward()
    assert calls.normalize[0] == 5
    assert [m.raw.grad.dtype for m in layers(model)] == list(dtypes)  # type: ignore[union-attr]
    model[1].bfloat16()
    model[0].dtype = torch.bfloat16
    agree(model, torch.randn(4, 6))


# -- autograd, compilation, threads -----------------------------------------------------------------------------------


@pytest.mark.parametrize("every_layer", [False, True])
def test_checkpoints(every_layer: bool) -> None:
    model = normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.1))
    model.zero_grad()
    x = X.clone().requires_grad_()
    model(x).square().sum().backward()
    wanted, before = gradients(model), states(model)
    model.zero_grad()
    with Calls() as calls:
        if every_layer:
            h = x
            for layer in model:
                h = checkpoint(layer, h, use_reentrant=False)
        else:
            h = checkpoint(model, x, use_reentrant=False)
        assert calls.normalize == [4]
        h.square().sum().backward()
    assert sum(calls.normalize) == 8
    assert unchanged(model, before)
    assert all(map(torch.equal, gradients(model), wanted))
    model(x)
    assert ready(model) == 0


def test_a_checkpoint_of_the_first_use_after_a_step() -> None:
    model = normalised()
    step(model, X, torch.optim.SGD(model.parameters(), 0.1))
    twin = copy.deepcopy(model)
    leave_ready(model)
    model.zero_grad()
    checkpoint(model, X, use_reentrant=False).sum().backward()
    twin.zero_grad()
    twin(X).sum().backward()
    assert all(map(torch.equal, gradients(model), gradients(twin)))


def test_two_forwards_then_two_backwards() -> None:
    model = normalised()
    other = torch.randn_like(X)
    wanted = []
    for x in (X, other):
        model.zero_grad()
        model(x).square().mean().backward()
        wanted.append(gradients(model))
    model.zero_grad()
    losses = [model(x).square().mean() for x in (X, other)]
    losses[1].backward(retain_graph=True)
    assert all(map(torch.equal, gradients(model), wanted[1]))
    losses[0].backward()
    assert_close(gradients(model), [a + b for a, b in zip(*wanted)], 1e-6)
    losses[1].backward()
    assert_close(gradients(model), [a + 2 * b for a, b in zip(*wanted)], 1e-6)


def test_double_backward() -> None:
    model = normalised()
    found = []
    for context in (contextlib.nullcontext, plain_pytorch):
        with context():
            x = X.clone().requires_grad_()
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            model.zero_grad()
            slope.square().sum().backward()
            parameters = list(model.parameters())
            penalised = torch.autograd.grad(model(X).square().sum(), parameters, create_graph=True)
            sum(p.square().sum() for p in penalised).backward()  # type: ignore[union-attr]
            found.append(gradients(model))
    assert_close(*found, tolerance=1e-5)
    model.zero_grad()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_made_ready_without_gradients_serve_training(mode: type) -> None:
    model = normalised()
    twin = copy.deepcopy(model)
    with mode():
        leave_ready(model)
    for m in (model, twin):
        m(X).square().sum().backward()
    assert all(map(torch.equal, gradients(model), gradients(twin)))
    leave_ready(model)
    with mode():
        out = model(X)
    assert torch.equal(out, model(X))
    move_in_place(model)
    with mode():
        leave_ready(model)
        move_in_place(model)
    agree(model).square().sum().backward()


def test_autocast() -> None:
    model = normalised()
    leave_ready(model)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        agree(model).float().sum().backward()
        assert model[0].weight.dtype == torch.float32
    agree(model)


def test_functional_call() -> None:
    """With tensors in the parameters' place, and with other parameters."""
    model = normalised()
    expected = agree(model)
    for make in (moved, lambda p: nn.Parameter(moved(p))):
        replacement = {name: make(p) for name, p in model.named_parameters()}
        leave_ready(model)
        found = torch.func.functional_call(model, replacement, (X,))
        with plain_pytorch():
            assert torch.equal(found, torch.func.functional_call(model, replacement, (X,)))
        assert not torch.equal(found, expected)
        agree(model)


def test_functional_calls_with_other_tensors_one_after_the_other() -> None:
    """Tensors in the parameters' place have no address that tells them apart."""
    x = torch.randn(4, 6)
    model = apply_spectral_norm(Chosen(), x, beta=0.5)
    first, second = ({name: moved(p) for name, p in model.named_parameters()} for _ in range(2))
    torch.func.functional_call(model, first, (x, "ac"))
    found = torch.func.functional_call(model, second, (x, "bac"))
    with plain_pytorch():
        assert torch.equal(found, torch.func.functional_call(model, second, (x, "bac")))


def test_transforms_of_functions_take_plain_operations() -> None:
    model = normalised()
    leave_ready(model)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, X)
    group = layers(model)[0]._group
    waiting = group._ready
    mapped = torch.func.vmap(model)(X[:, None])[:, 0]
    assert group._ready is waiting  # nothing computed, nothing taken
    assert len(waiting) == 3
    torch.testing.assert_close(mapped, model(X), rtol=1e-5, atol=1e-6)
    for i, x in enumerate(X):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(each[name][i], p.grad, rtol=1e-4, atol=1e-6)
    agree(model)


def test_compiled_training_equals_eager() -> None:
    model = normalised()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    losses: list[list[Tensor]] = [[], []]
    for into, run, module in ((losses[0], compiled, model), (losses[1], twin, twin)):
        optimizer = torch.optim.SGD(module.parameters(), 0.2)
        for _ in range(4):
            leave_ready(module)  # compiled code does not take these
            into.append(step(run, X, optimizer))
            update_spectral_norm(module)
    torch.testing.assert_close(*map(torch.stack, losses), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(agree(model), agree(twin), rtol=1e-4, atol=1e-5)


def test_compiled_gradients_lie_as_the_weights() -> None:
    """Where the memory formats of weights and activations differ."""
    model = apply_spectral_norm(nn.Sequential(nn.Conv2d(2, 6, 3), nn.Conv2d(6, 4, 3)), X[:1], beta=0.3)
    model[1].to(memory_format=torch.channels_last)
    found = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        run(X.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        found.append(gradients(model))
        assert [g.stride() for g in found[-1]] == [p.stride() for p in model.parameters()]
    assert_close(*found, tolerance=1e-5)


def test_threads_share_a_model() -> None:
    """A weight that one thread has made ready may go to another: neither may be left without."""
    model = normalised().eval()
    expected = agree(model)
    failures: list[BaseException] = []

    def serve() -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    assert torch.equal(model(X), expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures


def test_another_use_right_after_the_launch() -> None:
    """What another thread can do between a launch and its result: use the same layer."""
    model = normalised()
    expected = agree(model)
    member = layers(model)[0]
    taken: list[Tensor | None] = []

    class Interrupted(groups.Group):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "_ready" and not taken:
                taken.append(None)
                taken[0] = self.take_normalized(member)

    member._group.__class__ = Interrupted
    assert torch.equal(model(X), expected)
    assert taken[0] is not None


@pytest.mark.skipif(DEVICE.type != "cpu", reason="makes streams up")
def test_weights_made_ready_on_another_stream_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may not be there yet, and their memory belongs to the other stream."""
    model = normalised()
    leave_ready(model)
    with Calls() as calls:
        assert model[0].weight is not None
        assert calls.normalize == []
        monkeypatch.setattr(groups, "stream_of", lambda device: (7, 0))
        assert model[2].weight is not None
        assert model[4].weight is not None
        assert calls.normalize == [4]


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_ready", [False, True])
def test_replaced_layers_and_models_are_freed(weights_ready: bool) -> None:
    model = normalised()
    model(X).sum().backward()
    if weights_ready:
        leave_ready(model)
    first, parameter = weakref.ref(model[0]), weakref.ref(layers(model)[0].raw)
    model[0] = nn.Conv2d(2, 6, 3, stride=2, padding=1)
    gc.collect()
    assert first() is None
    assert parameter() is None
    agree(model)
    if weights_ready:
        leave_ready(model)
    references = [weakref.ref(m) for m in layers(model)]
    del model
    gc.collect()
    assert not any(r() for r in references)


def test_a_forward_frees_its_weights() -> None:
    """Outside autograd each is freed as soon as its layer has run, and none is there twice."""
    model = normalised()
    alive: list[weakref.ref[Tensor]] = []
    real = groups.normalize_all

    def watched(*args: Any) -> list[Tensor]:
        values = real(*args)
        alive.extend(map(weakref.ref, values))
        return values

    counts = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(groups, "normalize_all", watched)
        hooks = [
            m.module.register_forward_hook(lambda *_: counts.append(sum(r() is not None for r in alive)))
            for m in layers(model)
        ]
        model(X)
        for hook in hooks:
            hook.remove()
    assert len(alive) == 4
    assert counts == [3, 2, 1, 0]


# -- training ---------------------------------------------------------------------------------------------------------


def conv_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ELU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4),
        nn.ELU(),
        nn.Conv2d(12, 70, 1),
        nn.ELU(),
        nn.ConvTranspose2d(70, 4, 2, stride=2),
        nn.Flatten(),
        nn.Linear(4 * 64, 5),
    )


@pytest.mark.parametrize("how", ["plain", "momentum", "fused", "hook", "adam_fused", "bfloat16"])
def test_training_equals_that_without_kernels(how: str) -> None:
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    model = apply_spectral_norm(conv_net(), torch.randn(1, 2, 8, 8), beta=0.6).to(dtype)
    data = [(torch.randn(16, 2, 8, 8).to(dtype), torch.randint(5, (16,))) for _ in range(5)]
    results = []
    for context in (contextlib.nullcontext, plain_pytorch):
        twin = copy.deepcopy(model)
        optimizer: torch.optim.Optimizer
        if how == "adam_fused":
            optimizer = torch.optim.Adam(twin.parameters(), 1e-3, eps=1e-3, fused=True)
        else:
            momentum = 0.9 if how == "momentum" else 0.0
            optimizer = torch.optim.SGD(twin.parameters(), 0.1, momentum=momentum, fused=how == "fused")
        if how == "hook":
            optimizer.register_step_post_hook(lambda *_, twin=twin: update_spectral_norm(twin))
        losses = []
        with context():
            for x, y in data:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(twin(x).float(), y)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            out = twin(data[0][0]).detach().float()
        results.append([torch.stack(losses), out, *(p.detach().float() for p in twin.parameters()), *states(twin)])
    names = [n for n, _ in model.named_parameters()]
    assert len(results[0]) > len(names)
    floats = [[t for t in r if t.is_floating_point()] for r in results]
    assert_close(*floats, tolerance=0.02 if how == "bfloat16" else 1e-4)
