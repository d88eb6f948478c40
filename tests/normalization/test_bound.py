"""bound=True and input_size="any": layers whose norm is provably at most beta."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sn_fast import apply_spectral_norm, operator_norm, operator_of, sigmas, spectral_norm, update_spectral_norm
from sn_fast.layers.linear import LinearOperator, nominal_size
from sn_fast.norms.grid import padding_norm, padding_norm_at_every_size

from ..layers.geometries import Case, cases


def layer(case: Case, dtype: torch.dtype) -> nn.Module | None:
    """The case as a PyTorch layer, where PyTorch has one."""
    padding = case.options["padding"]
    if not isinstance(padding, str) and any(isinstance(p, tuple) for p in padding):
        return None  # PyTorch's layers pad alike on both sides
    n = len(case.kernel)
    kinds = (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        if case.transposed
        else (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )
    module = kinds[n - 1](case.cin, case.cout, case.kernel, groups=case.groups, bias=False, **case.options).to(dtype)
    with torch.no_grad():
        module.weight.copy_(3 * case.weight(dtype))
    return module


def true_norm(module: nn.Module, size: tuple[int, ...]) -> Tensor:
    return torch.linalg.matrix_norm(operator_of(module, size).to_dense().detach().double(), 2)


@given(cases(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.sampled_from(["cap", "scale"]))
@settings(max_examples=150)
def test_norm_is_at_most_beta(case: Case, dtype: torch.dtype, mode: str) -> None:
    module = layer(case, dtype)
    if module is None:
        return
    spectral_norm(module, input_size=case.input_size, beta=0.7, mode=mode, bound=True)
    weight = module.weight
    assert weight.dtype == dtype
    assert true_norm(module, case.input_size) <= 0.7


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"), [(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 2, 2), (4, 3, 2, 1), (2, 2, 1, 2)]
)
def test_any_holds_at_every_size(mode: str, kernel: int, stride: int, padding: int, dilation: int) -> None:
    conv = nn.Conv1d(3, 4, kernel, stride, padding, dilation, padding_mode=mode, bias=False)
    for weight in (torch.randn(4, 3, kernel), torch.ones(4, 3, kernel)):
        conv = copy.deepcopy(conv)
        with torch.no_grad():
            conv.weight.copy_(weight)
        bounded = spectral_norm(copy.deepcopy(conv), input_size="any", mode="scale")
        norms = [float(true_norm(bounded, op.geometry.input_size)) for op in operators_at_all_sizes(bounded)]
        assert len(norms) > 30
        assert max(norms) <= 1
        if mode == "zeros":
            assert max(norms) > 0.97


@given(
    st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    *(st.integers(low, high) for low, high in [(1, 5), (1, 4), (0, 4), (1, 3)]),
)
def test_padding_norm_at_every_size(mode: str, kernel: int, stride: int, padding: int, dilation: int) -> None:
    conv = nn.Conv1d(1, 1, kernel, stride, padding, dilation, padding_mode=mode)
    (axis,) = operator_of(conv, nominal_size(conv)).geometry.axes
    assert mode == "zeros" or max(axis.after, 0) == padding
    bound = padding_norm_at_every_size(axis, mode)
    norms = [padding_norm(op.geometry.axes[0], mode) for op in operators_at_all_sizes(conv)]
    assert max(norms) <= bound
    if mode == "replicate" and stride == dilation == 1:
        assert max(norms) == bound or kernel > 1 + 2 * padding


def operators_at_all_sizes(conv: nn.Module) -> Iterator[LinearOperator]:
    for size in range(1, 40):
        try:
            yield operator_of(conv, size)
        except ValueError:
            continue  # too small for the kernel or the padding


def test_any_in_two_dimensions_needs_no_size_and_never_warns(recwarn: pytest.WarningsRecorder) -> None:
    conv = spectral_norm(nn.Conv2d(3, 8, 3, padding=1), input_size="any", beta=0.5)
    for size in itertools.product((1, 7, 20), repeat=2):
        conv(torch.randn(1, 3, *size))
        assert true_norm(conv, size) <= 0.5
    assert not recwarn.list


def test_transposed_any() -> None:
    conv = spectral_norm(nn.ConvTranspose1d(3, 4, 4, stride=2, padding=1), input_size="any", mode="scale")
    norms = [float(true_norm(conv, (size,))) for size in range(1, 30)]
    assert 0.97 < max(norms) <= 1


def test_sigma_is_a_bound_and_estimate_the_norm() -> None:
    conv = spectral_norm(nn.Conv2d(4, 6, 3, padding=1), input_size=(9, 9), bound=True, n_power_iterations=50)
    p = conv.parametrizations.weight[0]
    truth = float(true_norm_of_raw(conv))
    assert float(p.estimate) <= truth * (1 + 1e-6)
    assert truth <= float(p.sigma) <= truth * 1.001
    assert sigmas(conv) == {"": float(p.sigma)}


def true_norm_of_raw(conv: nn.Module) -> Tensor:
    return torch.linalg.matrix_norm(operator_of(conv, raw=True).to_dense().detach().double(), 2)


def test_follows_the_weight_through_training() -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 4))
    apply_spectral_norm(net, torch.randn(1, 3, 8, 8), beta=0.8, bound=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=5.0)
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.randn(16, 3, 8, 8)), torch.randint(4, (16,))).backward()
        optimizer.step()
        assert true_norm(net[0], (8, 8)) <= 0.8
        assert torch.linalg.matrix_norm(net[3].weight.detach().double(), 2) <= 0.8


def test_gradient_is_orthogonal_to_the_weight_in_scale_mode() -> None:
    """W and 2 W normalise alike, so the derivative along W is zero."""
    conv = spectral_norm(nn.Conv2d(4, 6, 3, padding=1).double(), input_size="any", mode="scale", n_power_iterations=200)
    raw = conv.parametrizations.weight.original
    (conv.weight * torch.randn_like(raw)).sum().backward()
    assert abs(float((raw.grad * raw.detach()).sum())) < 1e-9 * float(raw.grad.norm() * raw.detach().norm())


def test_a_checkpoint_gives_the_same_layer_and_a_false_sigma_is_not_believed() -> None:
    first = spectral_norm(nn.Conv2d(4, 6, 3), input_size=(9, 9), bound=True)
    state = copy.deepcopy(first.state_dict())
    assert "parametrizations.weight.0.estimate" in state
    second = spectral_norm(nn.Conv2d(4, 6, 3), input_size=(9, 9), bound=True)
    second.load_state_dict(state)
    assert torch.equal(first.weight, second.weight)
    state["parametrizations.weight.0.sigma"] *= 0.5
    second.load_state_dict(state)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(("stored", "loaded"), [(True, False), (False, True)])
def test_checkpoints_cross_between_bounded_and_not(stored: bool, loaded: bool) -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(4, 6, 3)
    first = spectral_norm(copy.deepcopy(conv), input_size=(9, 9), bound=stored, n_power_iterations=30)
    fresh = spectral_norm(nn.Conv2d(4, 6, 3), input_size=(9, 9), bound=loaded, n_power_iterations=30)
    fresh.load_state_dict(first.state_dict())
    direct = spectral_norm(conv, input_size=(9, 9), bound=loaded, n_power_iterations=30)
    torch.testing.assert_close(fresh.weight, direct.weight, rtol=1e-4, atol=1e-6)
    if loaded:
        assert true_norm(fresh, (9, 9)) <= 1


def test_reshape_embedding_and_linear() -> None:
    for module in (nn.Linear(7, 5), nn.Embedding(9, 4), nn.Conv2d(3, 5, 3)):
        operator = "reshape" if isinstance(module, nn.Conv2d) else "conv"
        with torch.no_grad():
            module.weight.mul_(10)
        spectral_norm(module, operator=operator, mode="scale", bound=True)
        norm = torch.linalg.matrix_norm(module.weight.detach().double().flatten(1), 2)
        assert 1 - 1e-4 < norm <= 1


def test_zero_and_nan_weights() -> None:
    conv = spectral_norm(nn.Conv2d(2, 2, 3), input_size="any")
    with torch.no_grad():
        conv.parametrizations.weight.original.zero_()
    assert torch.equal(conv.weight, torch.zeros(2, 2, 3, 3))
    with torch.no_grad():
        conv.parametrizations.weight.original.fill_(torch.nan)
    assert conv.weight.isnan().all()


def test_padding_that_repeats_inputs_is_certified_at_every_size_in_use() -> None:
    net = nn.Sequential(nn.Conv1d(2, 2, 3, padding=1, padding_mode="reflect", bias=False))

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).sum() + self.net(x[..., :3]).sum() + self.net(x[..., :2]).sum()

    apply_spectral_norm(Twice(), torch.randn(1, 2, 9), mode="scale", bound=True)
    norms = [float(true_norm(net[0], (size,))) for size in (9, 3, 2)]
    assert 0.98 < max(norms) <= 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match="gradient='full'"):
        spectral_norm(nn.Linear(3, 3), bound=True, gradient="full")


def test_the_certificate_follows_the_weight_in_compiled_code_too() -> None:
    conv = spectral_norm(nn.Conv2d(2, 2, 3), input_size=(5, 5), bound=True)
    state, x = conv.parametrizations.weight[0], torch.randn(1, 2, 5, 5)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    update = torch.compile(update_spectral_norm, fullgraph=True, backend="aot_eager")
    for run in (lambda: compiled(x), lambda: update(conv)):
        conv.parametrizations.weight.original.data.mul_(1.5)
        run()
        assert float(operator_norm(operator_of(conv, raw=True))) <= float(state.sigma)
        assert float(state.estimate) == pytest.approx(float(state.sigma), rel=0.02)


def test_estimate_agrees_with_an_unbounded_layer() -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 3, 3, padding=1)
    plain = spectral_norm(copy.deepcopy(conv), input_size=(6, 6))
    bounded = spectral_norm(conv, input_size=(6, 6), bound=True)
    assert torch.equal(plain.parametrizations.weight[0].sigma, bounded.parametrizations.weight[0].estimate)
    assert float(operator_norm(operator_of(conv, raw=True))) <= float(bounded.parametrizations.weight[0].sigma)
