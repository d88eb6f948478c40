from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sn_fast
from sn_fast.errors import UserError
from sn_fast.inspection import Inspection, LayerMeasurement, inspect_model, table
from sn_fast.layers import LinearOperator, operator_of

from ..layers.own_maps import BY_PRODUCTS, NOT_LINEAR, OF_ONE_WEIGHT, norm_of

ULP = 1e-12


def dense_norm(op: LinearOperator) -> float:
    return float(torch.linalg.svdvals(op.to_dense().detach().double())[0])


class Several(nn.Module):
    """All kinds of layers; one is used at two sizes, one never, one weight is tied, one parameter is in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 2, 3, stride=2)
        self.idle = nn.Conv1d(2, 3, 5)
        self.words = nn.Embedding(7, 5)
        self.read_out = nn.Linear(5, 7, bias=False)
        self.read_out.weight = self.words.weight
        self.again = self.twice
        self.free = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.stem(x))
        x = self.again(x[:, :, ::2, ::2])
        return self.read_out(self.words(torch.zeros(1, dtype=torch.long))).sum() + self.up(x).sum()


def test_every_kind_of_layer_against_dense_matrices():
    model = Several()
    found = inspect_model(model, (2, 9, 10))
    rows = {(layer.name, layer.input_size): layer for layer in found.layers}
    assert list(rows) == [
        ("stem", (9, 10)),
        ("twice", (5, 5)),
        ("twice", (3, 3)),
        ("up", (3, 3)),
        ("idle", None),
        ("words", None),
    ]
    for (name, size), layer in rows.items():
        if name != "idle":
            truth = dense_norm(operator_of(model.get_submodule(name), size))
            assert layer.lower <= truth * (1 + ULP)
            assert truth <= layer.upper * (1 + ULP)
            assert layer.width == layer.upper / layer.lower - 1
            assert layer.width < 1e-2
    for name in ("stem", "twice", "idle"):
        kernel = model.get_submodule(name).weight.detach().flatten(1).double()
        reshaped = next(layer.reshaped for layer in found.layers if layer.name == name)
        assert reshaped == pytest.approx(float(torch.linalg.matrix_norm(kernel, 2)), rel=1e-12)
    by_outputs = model.up.weight.detach().double().transpose(0, 1).flatten(1)
    assert rows["up", (3, 3)].reshaped == pytest.approx(float(torch.linalg.matrix_norm(by_outputs, 2)), rel=1e-12)
    stem = rows["stem", (9, 10)]
    assert stem.reshaped_error == pytest.approx(
        stem.reshaped / dense_norm(operator_of(model.stem, (9, 10))) - 1, abs=1e-2
    )
    assert (stem.kind, stem.window, rows["twice", (5, 5)].window) == ("Conv2d", "3x3 s2", "3x3 g2")
    assert rows["words", None].window == "7x5"
    assert rows["words", None].tied == ("read_out",)
    assert rows["words", None].reshaped is None
    idle = rows["idle", None]
    assert (idle.note, idle.lower, idle.upper, idle.certificate) == ("not used", None, None, None)
    assert found.unmeasured == ("free",)
    largest = max(found.measured(), key=lambda layer: layer.upper)
    assert found.largest() is largest
    bounds = [
        max(layer.upper for layer in found.measured() if layer.name == n) for n in ("stem", "twice", "up", "words")
    ]
    assert found.log10_product() == pytest.approx(math.log10(math.prod(bounds)))


def test_the_reshaped_norm_is_what_torch_converges_to():
    layer = parametrizations.spectral_norm(nn.Conv2d(3, 5, 3), n_power_iterations=500)
    raw = layer.parametrizations.weight.original.detach().clone()
    plain = nn.Conv2d(3, 5, 3)
    plain.weight.data = raw
    (row,) = inspect_model(plain, (3, 8, 8)).layers
    assert torch.allclose(layer.weight * row.reshaped, raw, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_the_weight_in_use_is_measured_and_nothing_moves(training):
    ours = sn_fast.spectral_norm(nn.Conv2d(2, 3, 3, padding=1), beta=0.25, mode="scale", input_size=(6, 6))
    theirs = parametrizations.spectral_norm(nn.Linear(3 * 36, 4))
    model = nn.Sequential(ours, nn.Flatten(), theirs).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = inspect_model(model, (2, 6, 6)).layers
    assert 0.2 < first.lower <= first.upper < 0.26
    assert second.upper == pytest.approx(dense_norm(operator_of(theirs.eval())), rel=1e-3)
    theirs.train(training)
    assert (first.kind, second.kind) == ("Conv2d", "Linear")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training == training for module in model.modules())


def test_a_layer_whose_input_size_was_not_known():
    model = nn.Sequential(sn_fast.spectral_norm(nn.Conv2d(2, 3, 3), beta=0.25, mode="scale"))
    (layer,) = inspect_model(model, (2, 6, 6)).layers
    assert 0.2 < layer.lower <= layer.upper < 0.26


def test_the_old_spectral_norm_of_torch():
    layer = nn.utils.spectral_norm(nn.Linear(6, 6), n_power_iterations=50)
    layer(torch.zeros(1, 6))
    (row,) = inspect_model(nn.Sequential(layer), (6,)).layers
    assert row.upper == pytest.approx(1, rel=1e-2)


def test_tied_raw_weights_that_are_normalised_apart_are_not_tied():
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    b.weight = a.weight
    model = nn.Sequential(sn_fast.spectral_norm(a, beta=0.1), sn_fast.spectral_norm(b, beta=0.2, mode="scale"))
    rows = inspect_model(model, (4,)).layers
    assert [round(layer.upper, 2) for layer in rows] == [0.1, 0.2]


def test_parts_of_an_attention_layer():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = inspect_model(model, (5, 8))
    assert [layer.name for layer in found.layers] == ["self_attn.out_proj", "linear1", "linear2"]
    assert all(layer.upper for layer in found.layers)
    assert found.layers[0].note == "its forward is not called"
    assert found.unmeasured == ("self_attn.in_proj_weight",)


def test_indices_in_place_of_numbers():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 2))
    assert [layer.note for layer in inspect_model(model, (6,)).layers] == ["", ""]


def test_dtypes_and_zero_and_lazy_layers():
    for dtype in (torch.float64, torch.bfloat16):
        (layer,) = inspect_model(nn.Sequential(nn.Linear(4, 3).to(dtype)), (4,)).layers
        assert 0 < layer.lower <= layer.upper
    zero = nn.Conv2d(1, 1, 3)
    zero.weight.data.zero_()
    (layer,) = inspect_model(zero, (1, 5, 5)).layers
    assert (layer.name, layer.lower, layer.upper, layer.width, layer.reshaped, layer.reshaped_error) == (
        "", 0.0, 0.0, 0.0, 0.0, None,
    )  # fmt: skip
    assert inspect_model(zero, (1, 5, 5)).log10_product() == -math.inf
    (layer,) = inspect_model(nn.Sequential(nn.LazyConv2d(2, 3)), (1, 5, 5)).layers
    assert layer.upper > 0


def test_include_and_exclude():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    assert [layer.name for layer in inspect_model(model, (2,), include="[012]", exclude="1").layers] == ["0", "2"]
    for options, expected in (
        ({"include": "conv"}, r"argument `include`: no layer is left of 0, 1, 2, 3$"),
        ({"exclude": "."}, r"argument `exclude`: no layer is left of 0, 1"),
        ({"include": "("}, r"argument `include`: '\(' is not a regular expression"),
    ):
        with pytest.raises(UserError, match=expected):
            inspect_model(model, (2,), **options)


def test_what_cannot_be_measured():
    with pytest.raises(UserError, match="argument `model`: the model has no Linear, Embedding or convolution"):
        inspect_model(nn.ReLU(), (2,))
    bad = nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 1))
    bad[0].weight.data[0, 1] = math.inf
    with pytest.raises(UserError, match="layer 0: its weight has NaN or infinite elements"):
        inspect_model(bad, (2,))
    with pytest.raises(UserError, match="layer 0: its weight has no values yet"):
        inspect_model(nn.Sequential(nn.Linear(2, 2, device="meta")), (2,))


@pytest.mark.parametrize(
    ("model", "size", "hint"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3)), (3, 8, 8), "e.g. 1x32x32: layer 0 takes 1 channels"),
        (nn.Sequential(nn.Conv1d(4, 2, 3)), (3, 8), "e.g. 4x32: layer 0 takes 4 channels"),
        (nn.Sequential(nn.Linear(784, 2)), (3, 8, 8), "e.g. 784: layer 0 takes 784 features"),
        (nn.Sequential(nn.Embedding(3, 2), nn.Linear(3, 2)), (8,), "e.g. 16 for 16 indices"),
    ],
)
def test_an_input_size_that_does_not_fit_names_one_that_may(model, size, hint):
    with pytest.raises(UserError, match=r"^argument `input_size`: the model does not take an input of size") as caught:
        inspect_model(model, size)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_properties_of_rows_without_a_norm():
    row = LayerMeasurement("a", "Conv2d", "3x3", reshaped=2.0)
    assert (row.width, row.reshaped_error) == (None, None)
    assert Inspection((row,)).largest() is None
    assert LayerMeasurement("a", "Linear", "3x3", lower=0.0, upper=1.0).width == math.inf


def test_layers_with_a_forward_of_their_own() -> None:
    torch.manual_seed(0)

    def made(variant: str, *args: object, **options: object) -> nn.Module:
        return {**OF_ONE_WEIGHT, **BY_PRODUCTS}[variant](nn.Conv2d, *args, **options)

    model = nn.Sequential(
        made("standardised", 2, 3, 3, padding=1),
        made("adapter", 3, 3, 3, padding=1),
        NOT_LINEAR["gate"][0](nn.Conv2d, 3, 2, 3),
        made("weight_norm by hook", 2, 2, 2),
    )
    found = inspect_model(model, (2, 8, 7)).layers
    rows = {row.name: row for row in found}
    for name, shape in (("0", (2, 8, 7)), ("1", (3, 8, 7)), ("3", (2, 6, 5))):
        truth = norm_of(model[int(name)], *shape)
        row = rows[name]
        assert row.lower is not None
        assert row.upper is not None
        assert row.lower * (1 - 1e-6) <= truth <= row.upper * (1 + 1e-6)
        assert row.upper <= 1.02 * truth
        assert row.certificate is not None
        assert row.certificate.certified
    assert rows["2"].upper is None
    assert "not measured: sigmoid of its input" in rows["2"].note
    assert "not measured" in table(inspect_model(model, (2, 8, 7)))
    assert rows["0"].reshaped != pytest.approx(float(torch.linalg.matrix_norm(model[0].weight.flatten(1), 2)), rel=0.1)
