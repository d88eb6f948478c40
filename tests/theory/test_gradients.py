"""Gradient norms against one sample at a time, and norm gains."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sn_fast import apply_spectral_norm
from sn_fast.theory import gradient_norms, norm_gain


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ELU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 4)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_sample_has_its_own_gradient(dtype):
    """Seven samples in batches of three: the published code multiplies the last, short one by a whole batch's size."""
    model = network().to(dtype)
    x, y = torch.rand(7, 1, 6, 6, dtype=dtype), torch.arange(7) % 4
    found = gradient_norms(model, x, y, batch_size=3)
    model.eval()
    truth = []
    for one, label in zip(x, y):
        one = one.double().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model.double()(one[None]), label[None]), one)
        truth.append(float(gradient.norm()))
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx(truth, rel=1e-4 if dtype == torch.float32 else 1e-9)


def test_nothing_is_left_behind():
    model = network()
    apply_spectral_norm(model, torch.rand(1, 1, 6, 6))
    model.train()
    x, y = torch.rand(5, 1, 6, 6, requires_grad=True), torch.arange(5) % 4
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():
        gradient_norms(model, x, y)
        norm_gain(model, x)
    assert model.training
    assert model[1].training
    assert x.grad is None
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_gradients_too_small_for_their_squares_are_counted():
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 0]]) * 1e-20)
    x = torch.rand(4, 3)
    (first, *_) = gradient_norms(model.float(), x, torch.zeros(4, dtype=torch.int64)).tolist()
    assert first == pytest.approx(0.5e-20, rel=1e-4)
    wide = torch.full((1, 4), 1e25)
    assert norm_gain(nn.Flatten(), wide).tolist() == pytest.approx([1.0])


def test_other_losses_and_own_predictions():
    model, x = nn.Linear(3, 2), torch.rand(4, 3)
    y = model(x).argmax(dim=1)
    assert torch.equal(gradient_norms(model, x, None), gradient_norms(model, x, y))
    weight = model.weight.detach()
    steepest = gradient_norms(model, x, y, loss=lambda logits, y: logits[:, 0])
    assert steepest.tolist() == pytest.approx([float(weight[0].norm())] * 4)
    one = nn.Linear(3, 1)
    assert gradient_norms(one, x, torch.tensor([0, 1, 0, 1]), loss="bce").shape == (4,)


def test_norm_gain():
    model = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([2.0, 1.0, 0.5])))
    x = torch.cat((torch.eye(3), torch.zeros(1, 3))).double()
    gains = norm_gain(model, x, batch_size=2).tolist()
    assert gains[:3] == [2.0, 1.0, 0.5]
    assert gains[3] != gains[3]
    image = torch.rand(2, 1, 6, 6)
    net = network().eval()
    expected = net(image).norm(dim=1) / image.flatten(1).norm(dim=1)
    assert norm_gain(net, image).tolist() == pytest.approx(expected.tolist())


def test_bad_input():
    model, x = nn.Linear(3, 2), torch.rand(4, 3)
    assert gradient_norms(model, x[:0], None).shape == (0,)
    with pytest.raises(ValueError, match="y has the label 2, but the model has 2 classes"):
        gradient_norms(model, x, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="y must be a tensor with one entry for each of the 4 samples"):
        gradient_norms(model, x, torch.tensor([0, 1, 1]))
    with pytest.raises(TypeError, match="x must be floating point"):
        gradient_norms(model, x.long(), None)
    with pytest.raises(ValueError, match="batch_size"):
        gradient_norms(model, x, None, batch_size=0)
    with pytest.raises(ValueError, match="loss='mse' is unknown"):
        gradient_norms(model, x, None, loss="mse")
    with pytest.raises(ValueError, match="tensor with 4 rows, got list"):
        norm_gain(lambda x: [x], x)
