"""However a weight is written, the next forward has the right norm, and the state moves once; else it never moves."""

from __future__ import annotations

import copy
import ctypes
import io
import multiprocessing
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.dlpack import from_dlpack

import sn_fast

from ..on_device import DEVICE
from ..process_groups import process_group
from .cases import HOWS, KINDS, full_state, layer_of, made, norm_in_use, raw_norm, raw_of, same_bits


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class WritesData(torch.optim.Optimizer):
    """A step of gradient descent by ``.data``, as many published optimizers write it."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 1.0})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"])


def _by_optimizer(make):
    def write(model: nn.Module, target: Tensor) -> None:
        raw = raw_of(model)
        raw.grad = raw.detach() - target
        make([raw]).step()
        raw.grad = None

    return write


def _without_no_grad(model: nn.Module, target: Tensor) -> None:
    raw = raw_of(model).requires_grad_(False)
    raw.copy_(target)
    raw.requires_grad_(True)


def _assign_data_in_the_same_memory(model: nn.Module, target: Tensor) -> None:
    raw = raw_of(model)
    raw.data = torch.empty(0)
    raw.data = target.clone()  # the allocator may give the memory that was just freed


def _free_and_fill_storage(model: nn.Module, target: Tensor) -> None:
    storage = raw_of(model).untyped_storage()
    size = storage.size()
    storage.resize_(0)
    storage.resize_(size)
    raw_of(model).data.copy_(target)


def _numpy_memory(model: nn.Module, target: Tensor) -> None:
    raw = raw_of(model)
    array = raw.detach().numpy().copy()
    raw.data = torch.from_numpy(array)
    before = full_state(model)
    assert layer_of(model).weight.isfinite().all()  # a use
    assert same_bits(full_state(model), before)
    array[...] = target.numpy()


def _memory_of_a_process(model: nn.Module, target: Tensor) -> None:
    raw = raw_of(model)
    raw.share_memory_()
    process = multiprocessing.get_context("fork").Process(target=_copy_by_numpy, args=(raw.detach(), target))
    process.start()
    process.join()
    assert process.exitcode == 0


def _copy_by_numpy(to: Tensor, source: Tensor) -> None:
    to.numpy()[...] = source.numpy()


def _memmove(model: nn.Module, target: Tensor) -> None:
    if DEVICE.type != "cpu":
        pytest.skip("the host cannot reach a GPU's memory")
    target = target.contiguous()
    ctypes.memmove(raw_of(model).data_ptr(), target.data_ptr(), target.numel() * target.element_size())


def _rows(model: nn.Module, target: Tensor) -> None:
    for i in range(len(target)):
        raw_of(model).data[i] = target[i]


def _masked(model: nn.Module, target: Tensor) -> None:
    every = torch.ones_like(target, dtype=torch.bool)
    raw_of(model).data[every] = target[every]


def _polyak(model: nn.Module, target: Tensor) -> None:
    raw = raw_of(model)
    raw.data.mul_(0.5)
    torch.add(raw.data, target, alpha=0.5, out=raw.data)


@torch.no_grad()
def _in_place(model: nn.Module, target: Tensor) -> None:
    raw_of(model).copy_(target)


@torch.no_grad()
def _set(model: nn.Module, target: Tensor) -> None:
    raw_of(model).set_(target.clone())


@torch.no_grad()
def _lists(model: nn.Module, target: Tensor) -> None:
    torch._foreach_copy_([raw_of(model)], [target])


@torch.no_grad()
def _dispatch_mode(model: nn.Module, target: Tensor) -> None:
    with Passing():
        torch._foreach_copy_([raw_of(model)], [target])


@torch.inference_mode()
def _inference_mode(model: nn.Module, target: Tensor) -> None:
    raw_of(model).copy_(target)


def _other_parameter(model: nn.Module, target: Tensor) -> None:
    layer_of(model).parametrizations.weight.original = nn.Parameter(target.clone())


def _assigned_weight(model: nn.Module, target: Tensor) -> None:
    layer_of(model).weight = target


def _swapped(model: nn.Module, target: Tensor) -> None:
    torch.utils.swap_tensors(raw_of(model), nn.Parameter(target.clone()))


def _reinitialised(model: nn.Module, target: Tensor) -> None:
    nn.init.normal_(raw_of(model), std=float(target.std()))


def _from_a_vector(model: nn.Module, target: Tensor) -> None:
    nn.utils.vector_to_parameters(target.flatten(), [raw_of(model)])


WAYS = {
    "copy_ under no_grad": _in_place,
    "copy_ without no_grad": _without_no_grad,
    "copy_ in inference mode": _inference_mode,
    "set_": _set,
    "nn.init": _reinitialised,
    "data.copy_": lambda model, t: raw_of(model).data.copy_(t),
    "data.mul_": lambda model, t: raw_of(model).data.mul_(1.25),
    "data.add_": lambda model, t: raw_of(model).data.add_(t, alpha=0.1),
    "data, by rows": _rows,
    "data, by a mask": _masked,
    "data, through a view": lambda model, t: raw_of(model).data.view(-1).copy_(t.flatten()),
    "one element": lambda model, t: raw_of(model).data.view(-1)[-1:].mul_(1.0001),
    "data =": lambda model, t: setattr(raw_of(model), "data", t.clone()),
    "data = in the same memory": _assign_data_in_the_same_memory,
    "storage freed and filled": _free_and_fill_storage,
    "vector_to_parameters": _from_a_vector,
    "numpy view": lambda model, t: raw_of(model).detach().numpy().__imul__(2),
    "numpy memory": _numpy_memory,
    "DLPack view": lambda model, t: from_dlpack(raw_of(model).detach()).copy_(t),
    "memmove": _memmove,
    "process with shared memory": _memory_of_a_process,
    "_foreach_copy_": _lists,
    "_foreach_copy_ under a dispatch mode": _dispatch_mode,
    "optimizer that writes data": _by_optimizer(WritesData),
    "SGD, loop": _by_optimizer(lambda p: torch.optim.SGD(p, 0.1, foreach=False)),
    "SGD, foreach": _by_optimizer(lambda p: torch.optim.SGD(p, 0.1, foreach=True)),
    "SGD, fused": _by_optimizer(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "Adam, loop": _by_optimizer(lambda p: torch.optim.Adam(p, 0.01, foreach=False)),
    "Adam, foreach": _by_optimizer(lambda p: torch.optim.Adam(p, 0.01, foreach=True)),
    "Adam, fused": _by_optimizer(lambda p: torch.optim.Adam(p, 0.01, fused=True)),
    "polyak average": _polyak,
    "another Parameter": _other_parameter,
    "the layer's weight": _assigned_weight,
    "swap_tensors": _swapped,
}


def _used(model: nn.Module, kind: str) -> None:
    model(KINDS[kind].batch())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_every_write_gives_the_right_norm_and_moves_the_state_once(way: str, kind: str) -> None:
    training = (list(WAYS).index(way) + list(KINDS).index(kind)) % 2 == 0
    _check_write(WAYS[way], kind, "layer", training)
    _check_write(WAYS[way], kind, "model", not training)


def _check_write(write, kind: str, how: str, training: bool) -> None:
    model = made(kind, how).train(training)
    twin, before = copy.deepcopy(model), full_state(model)
    write(model, torch.randn_like(raw_of(model)))
    assert same_bits(full_state(model), before)  # nothing moves before the next use
    _in_place(twin, raw_of(model).detach())
    assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)
    after = full_state(model)
    assert not same_bits(after, before)
    _used(model, kind)
    assert same_bits(full_state(model), after)
    _used(twin, kind)
    _used(twin, kind)
    assert same_bits(full_state(twin), after)  # so it moved once, and by what a plain write moves it


def test_a_compiled_write() -> None:
    write = torch.compile(lambda weight, value: weight.copy_(value), backend="aot_eager")

    @torch.no_grad()
    def compiled(model: nn.Module, target: Tensor) -> None:
        write(raw_of(model), target)

    for kind, how in (("linear", "layer"), ("grouped", "model")):
        _check_write(compiled, kind, how, True)


@pytest.mark.parametrize("kind", KINDS)
def test_many_small_writes_are_followed(kind: str) -> None:
    """The state never falls behind a weight that moves by ``.data`` with every forward."""
    for how in HOWS:
        model = made(kind, how)
        for i in range(30):
            raw_of(model).data.add_(0.003 * torch.randn_like(raw_of(model)))
            model.train(i % 2 == 0)
            _used(model, kind)
        assert norm_in_use(model, kind) == pytest.approx(1.0, rel=1e-2)


def _forward_and_backward(model: nn.Module, kind: str) -> None:
    model(KINDS[kind].batch()).sum().backward()
    with torch.no_grad():
        _used(model, kind)
    with torch.inference_mode():
        _used(model, kind)


def _load_own_state(model: nn.Module, kind: str) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()))


def _load_own_state_by_assignment(model: nn.Module, kind: str) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def _load_through_a_file(model: nn.Module, kind: str) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))


def _load_through_pickle(model: nn.Module, kind: str) -> None:
    model.load_state_dict(pickle.loads(pickle.dumps(model.state_dict())))


def _memory_formats(model: nn.Module, kind: str) -> None:
    if raw_of(model).ndim == 4:
        model.to(memory_format=torch.channels_last)
        _used(model, kind)
        model.to(memory_format=torch.contiguous_format)


def _layout_of_data(model: nn.Module, kind: str) -> None:
    raw = raw_of(model)
    raw.data = raw.data.transpose(0, 1).contiguous().transpose(0, 1)


def _dtypes(model: nn.Module, kind: str) -> None:
    model.double()
    model(KINDS[kind].batch().double())
    model.float()


def _same_data(model: nn.Module, kind: str) -> None:
    raw = raw_of(model)
    raw.data.add_(0)
    _used(model, kind)
    raw.data = raw.data.clone()
    _used(model, kind)
    raw.data.mul_(2).mul_(0.5)


def _modes(model: nn.Module, kind: str) -> None:
    model.eval()
    _used(model, kind)
    model.train().requires_grad_(False)
    _used(model, kind)
    model.requires_grad_(True).zero_grad()


def _shared(model: nn.Module, kind: str) -> None:
    model.share_memory()


def _failed_forward(model: nn.Module, kind: str) -> None:
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, *[n + 1 for n in KINDS[kind].shape[:1]], *KINDS[kind].shape[1:]))


NO_WRITES = {
    f.__name__.strip("_"): f
    for f in (
        _used,
        _forward_and_backward,
        _load_own_state,
        _load_own_state_by_assignment,
        _load_through_a_file,
        _load_through_pickle,
        _memory_formats,
        _layout_of_data,
        _dtypes,
        _same_data,
        _modes,
        _shared,
        _failed_forward,
    )
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", NO_WRITES)
def test_nothing_moves_where_nothing_is_written(what: str, kind: str) -> None:
    for how in HOWS:
        for training in (True, False):
            model = made(kind, how).train(training)
            raw_of(model).data.add_(0.05 * torch.randn_like(raw_of(model)))
            _used(model, kind)  # a state that is not converged: another iteration would show
            before = full_state(model)
            NO_WRITES[what](model, kind)
            _used(model, kind)
            assert same_bits(full_state(model), before)
            twin = copy.deepcopy(model)
            _used(twin, kind)
            assert same_bits(full_state(twin), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_looked_at_once(kind: str, value: float) -> None:
    for how in HOWS:
        model = made(kind, how)
        good = raw_of(model).detach().clone()
        raw_of(model).data.view(-1)[0] = value
        _used(model, kind)
        after = full_state(model)
        _used(model, kind)
        _used(model.eval(), kind)
        assert same_bits(full_state(model), after)
        raw_of(model).data.copy_(good)
        assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_change_their_sign_and_come_alive(kind: str) -> None:
    for how in HOWS:
        model = made(kind, how)
        raw_of(model).data.zero_()
        assert norm_in_use(model, kind) == 0.0
        raw_of(model).data.neg_()
        assert norm_in_use(model, kind) == 0.0
        raw_of(model).data.normal_()
        assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_target_networks_by_data(kind: str) -> None:
    """target <- (1 - tau) target + tau online, by ``.data``, as reinforcement learning does it."""
    online = made(kind, "model")
    target = copy.deepcopy(online).eval()
    plain = copy.deepcopy(target)  # written in place, without ``.data``
    optimizer = torch.optim.Adam(online.parameters(), 0.001)
    for i in range(30):
        x = KINDS[kind].batch(8, seed=i)
        y = target(x).detach()
        assert torch.equal(plain(x), y)
        (online(x) - 0.5 * y - x.mean().sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for p, q in zip(target.parameters(), online.parameters()):
            p.data.mul_(0.9)
            torch.add(p.data, q.data, alpha=0.1, out=p.data)
        with torch.no_grad():
            for p, q in zip(plain.parameters(), online.parameters()):
                p.mul_(0.9).add_(q, alpha=0.1)
    assert norm_in_use(target, kind) == pytest.approx(1.0, rel=2e-2)
    assert norm_in_use(online, kind) == pytest.approx(1.0, rel=3e-2)  # one iteration for each step


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_averaged_model(kind: str, use_buffers: bool) -> None:
    model = made(kind, "model")
    averaged = AveragedModel(model, use_buffers=use_buffers)
    for _ in range(6):
        raw_of(model).data.add_(0.1 * torch.randn_like(raw_of(model)))
        _used(model, kind)
        averaged.update_parameters(model)
    assert norm_in_use(averaged.module.eval(), kind) == pytest.approx(1.0, rel=6e-3)
    assert list(sn_fast.sigmas(averaged.module).values()) == pytest.approx(
        [raw_norm(raw_of(averaged.module), kind)], rel=6e-3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_collectives_that_write_data(kind: str, tmp_path) -> None:
    dist = torch.distributed
    with process_group(tmp_path):
        for how in HOWS:
            model = made(kind, how)
            before = full_state(model)
            dist.all_reduce(raw_of(model).data)  # of one process: the same bits, in a new version
            dist.broadcast(raw_of(model).data, 0)
            _used(model, kind)
            assert same_bits(full_state(model), before)
            dist.all_reduce(raw_of(model).data.mul_(3))
            raw_of(model).data.div_(2)
            assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)
            assert not same_bits(full_state(model), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_checkpoint_counts_and_a_second_load_changes_nothing(kind: str, assign: bool) -> None:
    for how in HOWS:
        for training in (True, False):
            model, other = made(kind, how).train(training), made(kind, how, seed=5)
            model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
            after = full_state(model)
            assert same_bits(after, full_state(other))
            assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)
            model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
            _used(model, kind)
            assert same_bits(full_state(model), after)
            # Another weight beside the old vectors.
            stored = copy.deepcopy(other.state_dict())
            name = next(k for k in stored if k.endswith("weight.original"))
            stored[name] = torch.randn_like(stored[name])
            model.load_state_dict(stored, assign=assign)
            assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)


def test_no_optimizer_is_hooked() -> None:
    """Content decides, so an import of sn_fast and a normalised model leave optimizers alone."""
    hooks = dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)
    model = made("linear", "model")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    _used(model, "linear")
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert (dict(_global_optimizer_pre_hooks), dict(_global_optimizer_post_hooks)) == hooks
    assert not any("sn_fast" in getattr(h, "__module__", "") for found in hooks for h in found.values())
