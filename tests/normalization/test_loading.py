"""Checkpoints of every origin, models built without memory, and conversions: the norms in use are right afterwards."""

from __future__ import annotations

import copy
import io
import math
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import sn_fast

from .cases import HOWS, KINDS, full_state, layer_of, made, norm_in_use, norm_of, raw_of, same_bits
from .models import X, network, normalised, states, step


def convolutional(size: int, seed: int = 0, **options) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(4, 3, 3)
    )
    return sn_fast.apply_spectral_norm(net, torch.randn(1, 2, size, size), mode="scale", **options)


def convolution_norms(net: nn.Sequential, size: int) -> list[float]:
    sizes = (2, size), (4, size), (4, size)
    layers = [net[i] for i in (0, 2, 4)]
    return [norm_of(layer, (c, n, n)) for layer, (c, n) in zip(layers, sizes, strict=True)]


@pytest.mark.parametrize("options", [{}, {"gradient": "full"}, {"bound": True}])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_average_of_whole_state_dicts(kind: str, assign: bool, options: dict) -> None:
    """u, v and sigma of the average are averages too, and none of them is the averaged weight's."""
    model = made(kind, "model", **options)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    for i in range(25):
        torch.manual_seed(i)
        raw_of(model).data.add_(0.15 * torch.randn_like(raw_of(model)))
        model(KINDS[kind].batch())
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                average[name].lerp_(value, 0.1)
    for training in (False, True):
        loaded = made(kind, "model", seed=4, **options).train(training)
        loaded.load_state_dict(copy.deepcopy(average), assign=assign)
        norm = norm_in_use(loaded, kind)
        assert norm <= (1 + 1e-6 if options.get("bound") else 1.01)
        assert norm >= (0.5 if options.get("bound") else 0.99)


@pytest.mark.parametrize(("stored", "wanted"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_another_resolution(stored: int, wanted: int, assign: bool) -> None:
    state = convolutional(stored).state_dict()
    net = convolutional(wanted, seed=1)
    for _ in range(2):  # one warning for each load, however many layers
        with pytest.warns(UserWarning, match="input size") as found:
            net.load_state_dict(copy.deepcopy(state), assign=assign)
        assert len(found) == 1
        assert convolution_norms(net, wanted) == pytest.approx([1.0] * 3, rel=6e-3)


@pytest.mark.parametrize("missing", [("u", "v", "sigma"), ("u", "v"), ("v",), ("sigma",)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_without_vectors(kind: str, missing: tuple[str, ...]) -> None:
    for how in HOWS:
        stored = made(kind, how, seed=2).state_dict()
        stored = {name: t for name, t in stored.items() if name.rpartition(".")[2] not in missing}
        model = made(kind, how)
        model.load_state_dict(stored, strict=False)
        assert torch.equal(raw_of(model), raw_of(made(kind, how, seed=2)))
        assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)


# -- without memory ---------------------------------------------------------------------------------------------------


def on_meta(kind: str, how: str) -> nn.Module:
    with torch.device("meta"):
        layer = KINDS[kind].make()
    if how == "model":
        return sn_fast.apply_spectral_norm(nn.Sequential(layer), KINDS[kind].batch(1).to("meta"), mode="scale")
    return sn_fast.spectral_norm(layer, input_size=KINDS[kind].shape[1:] or None, mode="scale")


@pytest.mark.parametrize("kind", KINDS)
def test_from_meta_by_assignment(kind: str) -> None:
    for how in HOWS:
        model, stored = on_meta(kind, how), made(kind, how, seed=2)
        model.load_state_dict(stored.state_dict(), assign=True)
        x = KINDS[kind].batch()
        assert torch.equal(model(x), stored(x))
        assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)
        model = on_meta(kind, how)  # weights alone, as published
        plain = {n: t for n, t in stored.state_dict().items() if n.rpartition(".")[2] not in ("u", "v", "sigma")}
        plain = {n: t for n, t in plain.items() if not n.endswith("top_group")}
        model.load_state_dict(plain, assign=True, strict=False)
        assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)


@pytest.mark.parametrize("fill", [0.0, float("nan"), 1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_what_memory_holds_after_to_empty_does_not_survive(kind: str, fill: float) -> None:
    for how in HOWS:
        for was_on_meta in (True, False):
            model = (on_meta(kind, how) if was_on_meta else made(kind, how)).to_empty(device="cpu")
            with torch.no_grad():
                for t in (*model.parameters(), *model.buffers()):
                    t.fill_(fill) if t.is_floating_point() else t.zero_()
                for p in model.parameters():
                    nn.init.normal_(p)
            assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)
            assert all(t.isfinite().all() for t in model.buffers())


@pytest.mark.parametrize("kind", KINDS)
def test_to_empty_used_then_loaded(kind: str) -> None:
    model = on_meta(kind, "model").to_empty(device="cpu")
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            t.fill_(float("nan")) if t.is_floating_point() else t.zero_()
    model(KINDS[kind].batch())
    model.load_state_dict(made(kind, "model", seed=2).state_dict())
    assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)


# -- torch.__future__ -------------------------------------------------------------------------------------------------


@contextmanager
def future(swap: bool, overwrite: bool):
    f = torch.__future__
    before = f.get_swap_module_params_on_conversion(), f.get_overwrite_module_params_on_conversion()
    f.set_swap_module_params_on_conversion(swap)
    f.set_overwrite_module_params_on_conversion(overwrite)
    try:
        yield
    finally:
        f.set_swap_module_params_on_conversion(before[0])
        f.set_overwrite_module_params_on_conversion(before[1])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_conversions(kind: str, swap: bool, overwrite: bool) -> None:
    with future(swap, overwrite):
        for how in HOWS:
            model = made(kind, how)
            raw_of(model).data.add_(0.05 * torch.randn_like(raw_of(model)))
            model(KINDS[kind].batch())
            before = full_state(model)
            model.double()
            model(KINDS[kind].batch().double())
            model.to(torch.float32)
            model(KINDS[kind].batch())
            model.cpu()
            assert same_bits(full_state(model), before)
            raw_of(model).data.mul_(3)  # a change that is pending while the model is converted
            model.double()
            assert norm_in_use(model, kind) == pytest.approx(1.0, rel=2e-2)
            model.load_state_dict(made(kind, how, seed=2).double().state_dict())
            assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)
            model.bfloat16()
            assert norm_in_use(model, kind) == pytest.approx(1.0, rel=3e-2)
            assert all(t.dtype != torch.bfloat16 for t in model.buffers())
            model.float()
            for assign in (False, True):
                model.load_state_dict(made(kind, how, seed=3 + assign).state_dict(), assign=assign)
                assert norm_in_use(model, kind) == pytest.approx(1.0, rel=6e-3)
            model(KINDS[kind].batch()).sum().backward()
            model.half()
            assert norm_of(lambda x, m=model: m(x.half()).float(), KINDS[kind].shape) == pytest.approx(1.0, rel=1e-2)


# -- resumed training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["dictionary", "file", "file, assigned"])
@pytest.mark.parametrize("options", [{}, {"gradient": "full"}, {"bound": True}, {"n_power_iterations": 2}])
def test_resumed_training_has_the_bits_of_uninterrupted(options: dict, through: str) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), 0.01)

    torch.manual_seed(0)
    model = normalised(mode="scale", **options)
    optimizer = optimizer_of(model)
    for stop in (1, 3):  # resumed in the midst of the run, and once more
        for _ in range(stop):
            step(model, X, optimizer)
        torch.manual_seed(stop)
        resumed = normalised(mode="scale", **options)
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if through == "dictionary":
            saved = copy.deepcopy(saved)
        else:
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file)
        resumed.load_state_dict(saved["model"], assign=through.endswith("assigned"))
        other = optimizer_of(resumed)
        other.load_state_dict(saved["optimizer"])
        for _ in range(3):
            assert torch.equal(step(model, X, optimizer), step(resumed, X, other))
        model(X), resumed(X)
        assert same_bits(states(model), states(resumed))
        assert same_bits(list(model.parameters()), list(resumed.parameters()))


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("padding_mode", "circular"),
        ("padding_mode", "reflect"),
        ("stride", (2, 2)),
        ("stride", (1, 2)),
        ("dilation", (2, 2)),
        ("padding", (0, 0)),
        ("padding", (2, 2)),
    ],
)
@pytest.mark.parametrize("how", HOWS)
def test_settings_changed_after_normalising(how: str, setting: str, value: object) -> None:
    torch.manual_seed(0)
    layer, shape = nn.Conv2d(2, 3, 3, padding=1), (2, 7, 7)
    if how == "model":
        model = sn_fast.apply_spectral_norm(nn.Sequential(layer), torch.randn(1, *shape), mode="scale")
    else:
        model = sn_fast.spectral_norm(layer, input_size=7, mode="scale")
    setattr(layer_of(model), setting, value)
    if setting in ("padding", "padding_mode"):  # torch keeps the padding a second time
        padding = layer_of(model).padding
        layer_of(model)._reversed_padding_repeated_twice = [p for p in reversed(padding) for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert norm_of(model, shape) == pytest.approx(1.0, rel=1e-2)
        after = full_state(model)
        model(torch.randn(2, *shape))
    assert same_bits(full_state(model), after)


@pytest.mark.parametrize("how", HOWS)
def test_output_padding_and_groups_changed_after_normalising(how: str) -> None:
    torch.manual_seed(0)
    shape = (4, 4, 4)
    layer = nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1)
    grouped = nn.Conv2d(2, 4, 3, padding=1)  # its kernel is also that of two groups of 2 -> 2 channels
    for module, size, setting in ((layer, shape, {"output_padding": (1, 1)}), (grouped, (2, 4, 4), {"groups": 2})):
        if how == "model":
            model = sn_fast.apply_spectral_norm(nn.Sequential(module), torch.randn(1, *size), mode="scale")
        else:
            model = sn_fast.spectral_norm(module, input_size=4, mode="scale")
        for name, value in setting.items():
            setattr(layer_of(model), name, value)
        if "groups" in setting:
            layer_of(model).in_channels = 4
            size = (4, 4, 4)
        assert norm_of(model, size) == pytest.approx(1.0, rel=1e-2)


def test_plain_network_of_the_checkpoint_tests_loads_into_a_normalised_one() -> None:
    plain = network()
    model = normalised(mode="scale", beta=1.0)
    renamed = {}
    for name, value in plain.state_dict().items():
        renamed[name.replace(".weight", ".parametrizations.weight.original")] = value
    model.load_state_dict(renamed, strict=False)
    for m in model.modules():
        if isinstance(m, nn.Linear):
            assert norm_of(m, (m.in_features,)) == pytest.approx(1.0, rel=6e-3)


def _norm_of_grouped(weight: Tensor) -> Tensor:
    columns = torch.eye(4 * 16, dtype=torch.float64).reshape(-1, 4, 4, 4)
    images = torch.nn.functional.conv2d(columns, weight, padding=1, groups=2)
    return torch.linalg.matrix_norm(images.flatten(1), 2)


def _grouped(seed: int, options: dict) -> nn.Conv2d:
    torch.manual_seed(seed)
    layer = nn.Conv2d(4, 4, 3, padding=1, groups=2)
    with torch.no_grad():
        layer.weight.mul_(20)
        layer.weight[2 * seed : 2 * seed + 2].mul_(2)  # the group of the largest norm
    sn_fast.spectral_norm(layer, input_size=4, **options)
    sn_fast.update_spectral_norm(layer, 100)
    return layer


@pytest.mark.parametrize("options", [{}, {"mode": "scale"}, {"gradient": "full"}, {"bound": True}], ids=str)
def test_an_entry_that_does_not_fit_is_not_taken_on_trust(options: dict) -> None:
    source, layer = _grouped(0, options), _grouped(1, options)
    state, other = copy.deepcopy(source.state_dict()), copy.deepcopy(layer.state_dict())
    truth = state["parametrizations.weight.original"].double().requires_grad_()
    wanted, probe = truth / _norm_of_grouped(truth), torch.randn(truth.shape)
    (wanted_grad,) = torch.autograd.grad((wanted * probe).sum(), truth)
    raw = layer.parametrizations.weight.original
    for key in [key for key in state if key.startswith("parametrizations.weight.0.")]:
        numbers = [math.nan, math.inf, 0.0, 1.0, -1.0] if state[key].is_floating_point() else [-1, 1, 7]
        for entry in (other[key], -state[key], *(torch.full_like(state[key], number) for number in numbers)):
            layer.load_state_dict(other)
            layer.load_state_dict({**state, key: entry})
            weight = layer.weight
            (grad,) = torch.autograd.grad((weight * probe).sum(), raw)
            torch.testing.assert_close(weight.double(), wanted, rtol=0.03, atol=0.0)
            assert float((grad - wanted_grad).abs().max() / wanted_grad.abs().max()) < 0.08, (key, entry)
