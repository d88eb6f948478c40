"""The state of SpectralProjection: saved, loaded, and what becomes of it where weights and layers are replaced."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from sn_fast import SpectralProjection

from .projection_models import LAYERS, X, dense, network, norms, norms_of_matrix, shape_of, train


def test_a_saved_state_goes_on_bit_by_bit() -> None:
    model = network()
    projection = SpectralProjection(model, X[:1], beta=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    projection.attach(optimizer)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save([model.state_dict(), projection.state_dict()], file)
    train(model, optimizer, 3)
    again = network()
    other = SpectralProjection(again, X[:1], beta=0.5)
    file.seek(0)
    weights, state = torch.load(file)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    second = torch.optim.SGD(again.parameters(), 0.1)
    other.attach(second)
    train(again, second, 3)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
    assert all(torch.equal(t, other.state_dict()[k]) for k, t in projection.state_dict().items())


def test_names_are_those_of_the_plain_model() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wanted = SpectralProjection(network(), X[:1]).state_dict()
    model = network()
    model[3] = checkpoint_wrapper(model[3])
    compiled = torch.compile(model, backend="eager")
    found = SpectralProjection(compiled, X[:1], beta={"^3$": 1.0, ".": 2.0}).state_dict()
    assert found.keys() == wanted.keys()


def test_a_state_of_another_model_is_refused() -> None:
    projection = SpectralProjection(network(), X[:1])
    state = projection.state_dict()
    with pytest.raises(ValueError, match=r"state_dict has no '3\.sigma'"):
        projection.load_state_dict({k: t for k, t in state.items() if k != "3.sigma"})
    with pytest.raises(ValueError, match=r"has '7\.v', which is of no layer"):
        projection.load_state_dict({**state, "7.v": state["3.v"]})
    with pytest.raises(ValueError, match=r"state_dict\['3\.v'\] has shape \(16,\), here it is \(128,\)"):
        projection.load_state_dict({**state, "3.v": state["5.v"]})
    with pytest.raises(TypeError, match=r"state_dict is a list"):
        projection.load_state_dict([state])
    with pytest.raises(TypeError, match=r"state_dict\['3\.v'\] is a list"):
        projection.load_state_dict({**state, "3.v": [0.0]})


def test_a_replaced_weight_restarts() -> None:
    model = network()
    projection = SpectralProjection(model, X[:1], beta=0.5)
    with torch.no_grad():
        model[3].weight.copy_(torch.randn(16, 128))
    projection.restart()
    projection.step()
    assert abs(norms_of_matrix(model[3].weight) - 0.5) < 1e-2


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


@pytest.mark.parametrize(
    ("replaced", "lost"), [("head", "head"), ("inner.0", "inner.0"), ("inner", "inner.0"), ("inner.1", None)]
)
def test_a_replaced_layer_is_named(replaced: str, lost: str | None) -> None:
    model = Nested()
    projection = SpectralProjection(model, torch.zeros(1, 6))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    projection.attach(optimizer)
    parent, _, name = replaced.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Sequential(nn.Linear(6, 6)))
    if lost is None:  # no layer of the projection's
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match=f"layer '{lost}' is no longer in the model; make a new SpectralProjection"):
        optimizer.step()


@pytest.mark.parametrize("untied", [0, 2])
@pytest.mark.parametrize("by_load", [False, True])
def test_an_untied_weight_is_named(untied: int, by_load: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    projection = SpectralProjection(model, torch.zeros(1, 6))
    projection.step()
    if by_load:
        model.load_state_dict(model.state_dict(), assign=True)
    else:
        model[untied].weight = nn.Parameter(model[untied].weight.detach().clone())
    if model[0].weight is model[2].weight:
        projection.step()
        return
    with pytest.raises(RuntimeError, match=r"layers '0' and '2' no longer share one weight"):
        projection.step()


def test_a_wrapped_layer_is_still_there() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Nested()
    projection = SpectralProjection(model, torch.zeros(1, 6))
    model.inner = checkpoint_wrapper(model.inner)
    model.head = nn.Sequential(model.head)
    with torch.no_grad():
        model.head[0].weight *= 9
    projection.step()
    assert norms_of_matrix(model.head[0].weight) < 1.01


@pytest.mark.parametrize("kind", ["linear", "strided", "patches"])
@pytest.mark.parametrize("cap_singular_values", [False, True])
def test_state_made_in_inference_mode_serves_outside(kind: str, cap_singular_values: bool) -> None:
    layer = LAYERS[kind]()
    with torch.no_grad():
        layer.weight *= 9
    with torch.inference_mode():
        projection = SpectralProjection(
            nn.Sequential(layer), torch.zeros(1, *shape_of(layer, kind)), cap_singular_values=cap_singular_values
        )
        saved = {name: t.clone() for name, t in projection.state_dict().items()}
    for again in (lambda: None, projection.restart, lambda: projection.load_state_dict(saved), layer.double):
        with torch.inference_mode():
            again()
            projection.step()
        with torch.no_grad():
            layer.weight *= 3
        projection.step()
        assert abs(float(torch.linalg.matrix_norm(dense(layer, kind).detach(), 2)) - 1) < 0.02


def test_a_weight_of_another_shape_is_refused() -> None:
    model = network()
    projection = SpectralProjection(model, X[:1])
    model[5].weight = nn.Parameter(torch.randn(9, 16))
    with pytest.raises(
        RuntimeError, match=r"layer '5' has a weight of shape \(9, 16\) now, and had one of shape \(5, 16\)"
    ):
        projection.step()


def test_a_model_on_meta_is_projected_once_it_has_weights() -> None:
    with torch.device("meta"):
        model = network()
    projection = SpectralProjection(model, X[:1], beta=0.3)
    assert projection.state_dict() == {}
    with pytest.raises(RuntimeError, match=r"'0' is on the meta device; load or initialise it"):
        projection.step()
    model = model.to_empty(device=X.device)
    model.load_state_dict(network().state_dict())
    projection.step()
    for norm in norms(model):
        assert norm <= 0.3 * 1.02
