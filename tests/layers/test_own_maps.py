"""Certificates are about the map that runs, whatever its class, instance or hooks make of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils import spectral_norm as hook_spectral_norm

from sn_fast import (
    apply_spectral_norm,
    clip_spectrum,
    lipschitz_bound,
    operator_norm,
    operator_norm_bound,
    operator_norm_interval,
    operator_of,
    singular_values,
    spectral_norm,
    spectral_norm_summary,
)
from sn_fast.inspection import inspect_model
from sn_fast.layers.exact import why_not_its_class
from sn_fast.layers.operators import FunctionOperator
from sn_fast.layers.weighted import layer_operator

from .own_maps import BY_PRODUCTS, KINDS, NOT_LINEAR, OF_ONE_WEIGHT, matrix_of, norm_of, subclass


def make(variant: Any, kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(len(kind))
    cls, args, kwargs, shape = KINDS[kind]
    return variant(cls, *args, **kwargs).to(dtype), shape


def contents(module: nn.Module) -> dict[str, Any]:
    return {name: t.clone() for name, t in module.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", OF_ONE_WEIGHT)
def test_one_weight(kind: str, variant: str) -> None:
    module, shape = make(OF_ONE_WEIGHT[variant], kind)
    before, attributes = contents(module), set(vars(module))
    op = operator_of(module, shape[1:] or None)
    assert (set(vars(module)), contents(module).keys()) == (attributes, before.keys())
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    matrix = matrix_of(module, *shape)
    torch.testing.assert_close(op.to_dense().detach(), matrix, rtol=0, atol=1e-9 * float(matrix.abs().max()))
    truth = float(torch.linalg.matrix_norm(matrix, 2))
    lower, upper, info = operator_norm_interval(op, return_info=True)
    assert float(lower) <= truth * (1 + 1e-12)
    assert truth * (1 - 1e-12) <= float(upper) <= truth * 1.03
    assert info.certified
    assert float(operator_norm(op)) == pytest.approx(truth, rel=1e-5)
    for method in ("fft", "rowsum"):  # which need the weight
        assert float(operator_norm_bound(op, method=method)) >= truth * (1 - 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", BY_PRODUCTS)
def test_linear_maps_by_products(kind: str, variant: str) -> None:
    module, shape = make(BY_PRODUCTS[variant], kind)
    op = operator_of(module, shape[1:] or None)
    matrix = matrix_of(module, *shape)
    torch.testing.assert_close(op.to_dense(), matrix, rtol=0, atol=1e-9 * float(matrix.abs().max()))
    truth = float(torch.linalg.matrix_norm(matrix, 2))
    lower, upper, info = operator_norm_interval(op, return_info=True)
    assert float(lower) <= truth * (1 + 1e-12)
    assert truth * (1 - 1e-12) <= float(upper) <= truth * 1.001
    assert info.certified  # every operation is known to be linear
    torch.testing.assert_close(singular_values(op, 2), torch.linalg.svdvals(matrix)[:2], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", NOT_LINEAR)
def test_others_are_refused_by_name(kind: str, variant: str) -> None:
    variant_make, reason = NOT_LINEAR[variant]
    module, shape = make(variant_make, kind)
    with pytest.raises(
        ValueError, match=rf"this \w+ has a map of its own \(.*\) that cannot be measured: .*({reason})"
    ):
        operator_of(module, shape[1:] or None)
    row = inspect_model(nn.Sequential(module), shape).layers[0] if variant != "fails" else None
    assert row is None or (row.upper is None and "not measured" in row.note)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed2d"])
@pytest.mark.parametrize("variant", ["standardised", "adapter", "output doubled"])
def test_lower_precision(kind: str, variant: str, dtype: torch.dtype) -> None:
    module, shape = make({**OF_ONE_WEIGHT, **BY_PRODUCTS}[variant], kind, dtype)
    op = operator_of(module, shape[1:] or None)
    truth = norm_of(module, *shape)
    loose = 1e-5 if dtype == torch.float32 else 5e-2
    assert float(operator_norm(op, tol=loose)) == pytest.approx(truth, rel=loose)
    lower, upper = operator_norm_interval(op, tol=loose)
    assert float(lower) <= truth * (1 + loose)
    assert float(upper) >= truth * (1 - loose)


@pytest.mark.parametrize("pre", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_global_hooks(kind: str, pre: bool) -> None:
    module, shape = make(lambda cls, *a, **k: cls(*a, **k), kind)
    plain = norm_of(module, *shape)
    if pre:
        handle = register_module_forward_pre_hook(lambda m, i: (3 * i[0],))
    else:
        handle = register_module_forward_hook(lambda m, i, o: 3 * o)
    try:
        assert float(operator_norm(operator_of(module, shape[1:] or None))) == pytest.approx(3 * plain, rel=1e-5)
        with pytest.raises(ValueError, match="a global forward"):
            spectral_norm(module, input_size=shape[1:] or None)
    finally:
        handle.remove()
    assert float(operator_norm(operator_of(module, shape[1:] or None))) == pytest.approx(plain, rel=1e-5)


def test_a_map_of_its_own_is_known_at_one_input_size() -> None:
    module, _ = make(OF_ONE_WEIGHT["the same"], "conv2d")
    with pytest.raises(ValueError, match="input_size='any': Own overrides 'forward' of Conv2d"):
        spectral_norm(module, input_size="any")


def test_compiled_layers() -> None:
    layer = nn.Conv2d(2, 3, 3).double()
    truth = norm_of(layer, 2, 6, 6)
    assert float(operator_norm(operator_of(torch.compile(layer), (6, 6)))) == pytest.approx(truth, rel=1e-5)
    layer.compile()
    assert float(operator_norm(operator_of(layer, (6, 6)))) == pytest.approx(truth, rel=1e-5)


def test_padding_by_hand_is_part_of_the_convolution() -> None:
    class Same(nn.Conv2d):  # pads at the end first, as TensorFlow does
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)

    module = Same(3, 4, 3, stride=2).double()
    op = operator_of(module, (7, 8))
    layer = layer_operator(op)
    assert layer is not None
    assert float(operator_norm(op)) == pytest.approx(norm_of(module, 3, 7, 8), rel=1e-5)
    for mode in ("reflect", "replicate", "circular"):
        module = subclass(lambda m, w: 2 * w)(nn.Conv2d, 2, 3, 3, padding=(1, 2), padding_mode=mode).double()
        op = operator_of(module, (6, 7))
        assert layer_operator(op) is not None
        torch.testing.assert_close(op.to_dense().detach(), matrix_of(module, 2, 6, 7))


def test_padding_changed_after_the_layer_was_made() -> None:
    module = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular").double()
    module.padding = (0, 0)  # its forward goes on padding
    assert float(operator_norm(operator_of(module, (5, 6)))) == pytest.approx(norm_of(module, 2, 5, 6), rel=1e-5)


@pytest.mark.parametrize("change", ["scaled", "shuffled", "hooked", "plain"])
def test_embeddings(change: str) -> None:
    class Scaled(nn.Embedding):
        def forward(self, i: Tensor) -> Tensor:
            return super().forward(i) * self.embedding_dim**0.5

    module = (Scaled if change == "scaled" else nn.Embedding)(9, 4).double()
    if change == "hooked":
        module.register_forward_hook(lambda m, i, o: torch.tanh(o))
    if change == "shuffled":
        module.register_forward_hook(lambda m, i, o: o.roll(1, 0))
        with pytest.raises(ValueError, match="rows depend on the other indices"):
            operator_of(module)
        return
    with torch.no_grad():
        table = module(torch.arange(9))
    assert float(operator_norm(operator_of(module))) == pytest.approx(
        float(torch.linalg.matrix_norm(table, 2)), rel=1e-5
    )
    if change in ("scaled", "hooked"):
        with pytest.raises(ValueError, match="cannot be normalised by its weight"):
            spectral_norm(module)


ALLOWED = ["the same", "hooks that look", "hook that keeps the mean", "output shifted"]
REFUSED = sorted({*OF_ONE_WEIGHT, *BY_PRODUCTS} - {*ALLOWED})


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed1d"])
@pytest.mark.parametrize("variant", [v for v in REFUSED if not v.startswith(("pruned", "weight_norm", "parametrized"))])
@pytest.mark.parametrize("bound", [False, True])
def test_maps_that_are_not_the_weights_are_not_normalised(kind: str, variant: str, bound: bool) -> None:
    if variant == "_conv_forward replaced" and kind != "conv2d":
        pytest.skip("it has none")
    module, shape = make({**OF_ONE_WEIGHT, **BY_PRODUCTS}[variant], kind)
    before = module.weight.clone()
    with pytest.raises(
        ValueError, match=rf"{type(module).__name__} cannot be normalised by its weight: .*; it can be measured"
    ):
        spectral_norm(module, input_size=shape[1:] or None, bound=bound)
    model = nn.Sequential(nn.Identity(), module)
    with pytest.raises(ValueError, match=r"'1.*' cannot be normalised by (its|their) weights?.*exclude='\^\(1"):
        apply_spectral_norm(model, torch.randn(1, *shape).double(), bound=bound)
    assert torch.equal(module.weight, before)
    assert not hasattr(module, "parametrizations")


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d, circular", "transposed2d", "conv3d"])
@pytest.mark.parametrize("variant", ALLOWED)
def test_maps_that_are_the_weights_are_normalised(kind: str, variant: str) -> None:
    module, shape = make(OF_ONE_WEIGHT[variant], kind)
    model = apply_spectral_norm(nn.Sequential(module), torch.randn(1, *shape).double(), beta=0.5, bound=True)
    assert norm_of(module, *shape) == pytest.approx(0.5, rel=3e-2)
    assert norm_of(module, *shape) <= 0.5
    assert "unknown" not in spectral_norm_summary(model)
    raw = operator_of(module, shape[1:] or None, raw=True)
    assert float(operator_norm(raw)) == pytest.approx(float(module.parametrizations.weight[0].sigma), rel=3e-2)


def test_the_error_names_every_layer_and_its_remedy_works() -> None:
    standardised, _ = make(OF_ONE_WEIGHT["standardised"], "conv2d", torch.float32)
    doubled, _ = make(OF_ONE_WEIGHT["output doubled"], "conv2d", torch.float32)
    model = nn.ModuleDict({"a.b".replace(".", "_"): standardised, "plain": nn.Conv2d(2, 4, 3), "doubled": doubled})
    model.forward = lambda x: sum(m(x)[..., 1:4, 1:4].sum() for m in model.values())  # type: ignore[method-assign]
    x = torch.randn(1, 2, 6, 6)
    with pytest.raises(ValueError, match="layers 'a_b', 'doubled' cannot be normalised") as caught:
        apply_spectral_norm(model, x)
    pattern = str(caught.value).partition("exclude='")[2].rstrip("'")
    apply_spectral_norm(model, x, exclude=pattern)
    assert list(model["plain"].parametrizations) == ["weight"]


def test_a_summary_after_the_forward_was_replaced() -> None:
    layer = nn.Conv2d(2, 3, 3, padding=1)
    model = apply_spectral_norm(nn.Sequential(layer), torch.randn(1, 2, 6, 6), bound=True)
    assert float(spectral_norm_summary(model).splitlines()[1].split()[-1]) <= 1
    handle = layer.register_forward_hook(lambda m, i, o: 4 * o)
    assert float(spectral_norm_summary(model).splitlines()[1].split()[-1]) >= norm_of(layer, 2, 6, 6) * (1 - 1e-6) > 3
    handle.remove()
    layer.register_forward_hook(lambda m, i, o: torch.relu(o))
    assert "unknown: not its map" in spectral_norm_summary(model)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "transposed1d"])
@pytest.mark.parametrize("hook", ["weight_norm", "prune", "both", "spectral_norm"])
@pytest.mark.parametrize("training", [True, False])
def test_weights_that_hooks_compute_are_those_of_the_next_forward(kind: str, hook: str, training: bool) -> None:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        cls, args, kwargs, _ = KINDS[kind]
        module = cls(*args, **kwargs).double()
        if hook in ("weight_norm", "both"):
            weight_norm(module)
        if hook == "prune":
            prune.random_unstructured(module, "weight", amount=0.5)
        if hook == "both":
            prune.random_unstructured(module, "bias", amount=0.5)
        return hook_spectral_norm(module) if hook == "spectral_norm" else module

    shape = KINDS[kind][3]
    module, other = made(0).train(training), made(1)
    module(torch.randn(1, *shape).double())
    with torch.no_grad():
        for p in other.parameters():
            p *= 5
    module.load_state_dict(other.state_dict())
    stale = module.weight.clone()
    before = contents(module)
    op = operator_of(module, shape[1:] or None)
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert torch.equal(module.weight, stale)
    bound = lipschitz_bound(nn.Sequential(module), torch.randn(1, *shape).double()).bound
    row = inspect_model(nn.Sequential(module), shape).layers[0]
    module.train(training)
    with torch.no_grad():
        first = module(torch.zeros(1, *shape).double())  # the next forward computes the weight
    del first
    used = module.weight.detach().clone()
    assert not torch.equal(used, stale) or hook == "spectral_norm"
    found = layer_operator(op)
    assert found is not None
    torch.testing.assert_close(found.weight.detach(), used)
    if not training or hook != "spectral_norm":
        truth = float(operator_norm(op, method="dense"))
        assert bound == pytest.approx(truth, rel=3e-2)
        assert row.upper == pytest.approx(truth, rel=3e-2)


def test_other_parametrizations_are_effective_weights() -> None:
    for parametrization in (parametrizations.weight_norm, parametrizations.orthogonal, parametrizations.spectral_norm):
        module = parametrization(nn.Linear(6, 5).double()).eval()
        assert why_not_its_class(module) is None
        assert float(operator_norm(operator_of(module))) == pytest.approx(norm_of(module, 6), rel=1e-5)


def test_classes_that_are_not_registered() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6).double())

        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * x @ self.weight.T + 1

    class Squashed(Half):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    class Held(Half):
        forward = nn.Module.forward

    module = Half()
    assert float(operator_norm(operator_of(module))) == pytest.approx(norm_of(module, 6), rel=1e-5)
    with pytest.raises(ValueError, match=r"Squashed has a map of its own .* tanh of its input.*MatrixOperator"):
        operator_of(Squashed())
    held = Held()  # only the matrix
    assert torch.equal(operator_of(held).to_dense(), held.weight)


def test_hooks_that_read_values_leave_nothing_certified() -> None:
    module = nn.Linear(6, 5).double()
    seen: list[float] = []
    module.register_forward_hook(lambda m, i, o: seen.append(float(o.norm())))
    op = operator_of(module)
    assert isinstance(op, FunctionOperator)
    lower, upper, info = operator_norm_interval(op, return_info=True)
    truth = float(torch.linalg.matrix_norm(module.weight.detach(), 2))
    assert float(lower) <= truth <= float(upper) <= truth * 1.01
    assert not info.certified
    row = inspect_model(nn.Sequential(module), (6,)).layers[0]
    assert "not certified" in row.note


def test_clipping_changes_a_map_that_is_the_weights_alone() -> None:
    module, _ = make(OF_ONE_WEIGHT["standardised"], "conv2d")
    with pytest.raises(ValueError, match="clip_spectrum changes the weight of a layer whose map is that of its weight"):
        clip_spectrum(module, 1.0)
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda m, i, o: 2 * o)
    with pytest.raises(ValueError, match="clip_spectrum"):
        clip_spectrum(linear, 1.0)
    clip_spectrum(make(OF_ONE_WEIGHT["the same"], "conv2d")[0], 1.0)


def test_a_layer_on_the_meta_device() -> None:
    module = subclass(lambda m, w: 2 * w)(nn.Linear, 3, 4).to("meta")
    with pytest.raises(ValueError, match="meta device"):
        operator_of(module)


def test_the_input_size_is_still_needed() -> None:
    module, _ = make(OF_ONE_WEIGHT["standardised"], "conv2d")
    with pytest.raises(ValueError, match="input_size of this Own is not known"):
        operator_of(module)


def test_a_class_that_was_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(6, 5).double()
    plain = norm_of(module, 6)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, 3 * self.weight, self.bias))
    assert float(operator_norm(operator_of(module))) == pytest.approx(3 * plain, rel=1e-5)
    with pytest.raises(ValueError, match=r"Linear\.forward was replaced"):
        spectral_norm(module)


def test_a_lazy_layer_has_no_operator_yet() -> None:
    for lazy in (nn.LazyLinear(3), nn.LazyConv2d(3, 3)):
        with pytest.raises(ValueError, match="lazy parameter without a shape"):
            operator_of(lazy, (8, 8) if isinstance(lazy, nn.LazyConv2d) else None)
    lazy = nn.LazyLinear(3)
    lazy(torch.randn(2, 4))
    assert operator_of(lazy).in_shape == (4,)
