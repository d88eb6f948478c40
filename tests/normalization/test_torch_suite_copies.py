"""What PyTorch tests of its spectral_norm: copies, checkpoints, conversions and replicas (see test_torch_suite)."""

import copy
import io
import itertools
import pickle
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations as theirs
from torch.nn.utils import parametrize

import sn_fast

from .torch_cases import (  # noqa: F401 - swap is a fixture of every test
    PLACES,
    Mask,
    assert_true,
    buffers,
    matrix,
    normalised,
    same,
    spectral_norm,
    state_of,
    swap,
    trained,
    truth,
)

# -- copies, checkpoints, conversions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_a_deep_copy_is_equal_and_independent(place: str) -> None:
    layer, x = normalised(nn.Linear(3, 4), place), torch.randn(2, 3)
    trained(layer, x, 2)  # the change is pending
    twin = copy.deepcopy(layer)
    assert twin.__dict__.keys() == layer.__dict__.keys()
    a, b = layer.parametrizations.weight.original, twin.parametrizations.weight.original
    assert torch.equal(a, b)
    assert a is not b
    assert torch.equal(layer(x), twin(x))
    assert same(buffers(layer), buffers(twin))
    before = buffers(layer)
    trained(twin, x, 2)
    twin(x)
    assert same(buffers(layer), before)
    assert not same(buffers(twin), before)
    assert torch.equal(a, layer.parametrizations.weight.original)


def test_pickling_the_module_says_to_save_its_state() -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(spectral_norm(nn.Linear(3, 4)))


@pytest.mark.parametrize("activations", [0, 3])
@pytest.mark.parametrize("place", PLACES)
def test_state_dict(place: str, activations: int) -> None:
    layer, x = normalised(nn.Linear(3, 5), place), torch.randn(2, 3)
    trained(layer, x, activations)
    index = 1 if place == "on top of a mask" else 0
    prefix = f"parametrizations.weight.{index}."
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    mask = set() if place == "alone" else {f"parametrizations.weight.{1 - index}.kept"}
    ours = {prefix + name for name in ("u", "v", "sigma")}
    assert set(state) == {"bias", "parametrizations.weight.original"} | ours | mask
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "nonsense"'):
        layer.load_state_dict({**state, "nonsense": "nonsense"})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*weight\.original"):
        layer.load_state_dict({k: t for k, t in state.items() if not k.endswith("original")})
    layer.load_state_dict({**state, "nonsense": "nonsense"}, strict=False)
    out, before = layer(x).detach(), buffers(layer)
    # Loading is no change, in both modes, also into a layer that was normalised anew.
    for _ in range(2):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(5, 3))
        normalised(layer, place)
        layer.load_state_dict(state)
        for training in (False, True, True, False):
            assert torch.equal(layer.train(training)(x), out)
        assert same(buffers(layer), before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("stored", ["the same kind", "torch's"])
def test_every_part_of_a_state_dict_leaves_the_layer_normalised(stored: str, assign: bool) -> None:
    """Whatever of another layer's state is loaded: the weight in use has the norm 1, and the next use moves nothing."""
    torch.manual_seed(3)
    source = nn.Linear(6, 9)
    source = spectral_norm(source) if stored == "the same kind" else theirs.spectral_norm(source)
    trained(source, torch.randn(8, 6), 5, lr=1e-3)
    source(torch.randn(2, 6))
    state = source.state_dict()
    for size in range(len(state) + 1):
        for keys in itertools.combinations(state, size):
            layer = spectral_norm(nn.Linear(6, 9))
            layer.load_state_dict({k: state[k].clone() for k in keys}, strict=False, assign=assign)
            assert_true(layer, rtol=2e-2)
            before = buffers(layer)
            layer(torch.randn(2, 6))
            assert same(buffers(layer), before)


@pytest.mark.parametrize("place", PLACES)
def test_conversions_are_no_change(place: str) -> None:
    layer, x = normalised(nn.Linear(3, 4), place), torch.randn(2, 3)
    trained(layer, x, 2)
    out, before = layer(x).detach(), buffers(layer)
    layer.double().float().to("cpu").requires_grad_(True)
    assert torch.equal(layer(x), out)
    assert same(buffers(layer), before)
    assert "original" in layer.parametrizations.weight._parameters
    trained(layer, x, 1)
    layer.double()  # a change is pending
    layer(x.double())
    moved = buffers(layer)
    assert not same([b.float() for b in moved], before)
    layer(x.double())
    assert same(buffers(layer), moved)


@pytest.mark.parametrize("place", PLACES)
def test_swapped_parameters_are_followed(place: str) -> None:
    layer, x = normalised(nn.Linear(3, 4), place), torch.randn(2, 3)
    torch.utils.swap_tensors(layer.parametrizations.weight.original, nn.Parameter(torch.randn(4, 3)))
    layer(x)
    assert_true(layer, place)
    layer.parametrizations.weight.original = nn.Parameter(torch.randn(4, 3))
    layer(x)
    assert_true(layer, place)


@pytest.mark.parametrize("place", PLACES)
def test_assigning_the_weight(place: str) -> None:
    layer, wanted = normalised(nn.Linear(3, 4), place), torch.randn(4, 3)
    layer.weight = wanted
    assert torch.equal(layer.parametrizations.weight.original, wanted)
    assert_true(layer, place)


# -- DataParallel -----------------------------------------------------------------------------------------------------


@pytest.fixture
def replicate(monkeypatch: pytest.MonkeyPatch):
    """torch.nn.parallel.replicate with two copies in this machine's memory."""
    from torch.nn.parallel import replicate

    def copied(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        return [[t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices]

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", copied)
    return lambda module: replicate(module, [0, 1])


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_replicas_use_the_modules_state_and_their_gradients_reach_its_weight(place, trainable, replicate) -> None:
    layer, x = nn.Linear(3, 4), torch.randn(4, 3)
    layer.weight.requires_grad_(trainable)
    normalised(layer, place)
    single = copy.deepcopy(layer)
    for _ in range(3):
        outs = []
        for replica, part in zip(replicate(layer), x.chunk(2), strict=True):
            outs.append(replica(part))
        out, expected = torch.cat(outs), single(x)
        torch.testing.assert_close(out, expected)
        for module, result in ((layer, out), (single, expected)):
            module.zero_grad()
            result.square().sum().backward()
        ours, plain = (m.parametrizations.weight.original for m in (layer, single))
        if trainable:
            torch.testing.assert_close(ours.grad, plain.grad)
        else:
            assert ours.grad is None
        with torch.no_grad():
            for module in (layer, single):  # written as most foreign code does, without a new version
                module.parametrizations.weight.original.data.sub_(0.05)
        del outs, out, expected, result, replica
    layer(x)
    single(x)
    for a, b in zip(buffers(layer), buffers(single), strict=True):
        torch.testing.assert_close(a, b)


def test_replicas_of_a_whole_model(replicate) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ELU(), nn.Flatten(), nn.Linear(48, 4))
    x = torch.randn(4, 2, 4, 4)
    sn_fast.apply_spectral_norm(model, x, mode="scale", operator="reshape")
    for _ in range(2):
        out = torch.cat([r(part) for r, part in zip(replicate(model), x.chunk(2), strict=True)])
        before = [buffers(model[i]) for i in (0, 3)]
        torch.testing.assert_close(out, model(x))
        assert all(map(same, before, [buffers(model[i]) for i in (0, 3)]))
        out.square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                p.data.sub_(0.1 * p.grad)
        del out
