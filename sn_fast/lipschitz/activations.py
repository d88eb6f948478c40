"""Constants of activations: the largest slope, or the largest norm of the Jacobian."""

from __future__ import annotations

import math

from torch import nn

from .reductions import touches_batch
from .rounding import loosened, mul_up, root, root_of_squares
from .rules import Call, Constant, joint_rule, no_bound, rule

# Largest slopes without a closed form: the maximum of the derivative in float64, rounded up in the ninth digit.
_GELU_TANH = 1.128993069  # at x = 1.4185
_SILU = 1.099839321  # at x = 2.3994
_MISH = 1.088498162  # at x = 1.4906
# Above this threshold softplus(x) and x differ by less than half a float32 ulp of x.
_SOFTPLUS_SEAMLESS = 16.0


@rule("relu", nn.ReLU)
@rule("relu6", nn.ReLU6)
@rule("hardtanh", nn.Hardtanh)
@rule("softshrink", nn.Softshrink)
@rule("abs", "absolute")
def _piecewise_linear(call: Call) -> float:
    # slopes are 0, 1 and -1, without jumps, whatever the limits
    call.allows("min_val", "max_val", "lambd")
    return 1.0


@joint_rule("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(call: Call) -> float:
    # each element of the result is one of the three
    return root_of_squares(mul_up(call.repeated(call.get(n, None)), call.bound(n)) for n in ("input", "min", "max"))


@rule("leaky_relu", nn.LeakyReLU)
def _leaky_relu(call: Call) -> float:
    # slopes are 1 and negative_slope
    return max(1.0, abs(call.get("negative_slope", 0.01)))


@rule("prelu", nn.PReLU)
def _prelu(call: Call) -> float:
    # slopes are 1 and the channel's weight
    weight = call.get("weight")
    return max(1.0, float(weight.detach().abs().max()))


@rule("rrelu", nn.RReLU)
def _rrelu(call: Call) -> float | Constant:
    # in eval the negative slope is the mean of the two
    if call.get("training", False):
        return no_bound("rrelu draws its slope at random: it is not in eval mode")
    lower, upper = call.get("lower", 1 / 8), call.get("upper", 1 / 3)
    return max(1.0, loosened(abs(lower + upper) / 2))


@rule("elu", nn.ELU)
def _elu(call: Call) -> float:
    # slope alpha exp(x) for x < 0
    return max(1.0, abs(call.get("alpha", 1.0)))


@rule("celu", nn.CELU)
def _celu(call: Call) -> float | Constant:
    # slope exp(x / alpha) for x < 0
    if call.get("alpha", 1.0) <= 0:
        return no_bound("celu with alpha <= 0 grows exponentially")
    return 1.0


@rule("selu", nn.SELU)
def _selu(call: Call) -> float:
    # slope scale * alpha * exp(x) for x < 0; scale * alpha = 1.758 is the larger side
    return loosened(1.6732632423543772848170429916717 * 1.0507009873554804934193349852946)


@rule("gelu", nn.GELU)
def _gelu(call: Call) -> float:
    # the derivative Phi(x) + x phi(x) is largest at sqrt(2)
    if call.get("approximate", "none") == "tanh":
        return _GELU_TANH
    return loosened((1 + math.erf(1)) / 2 + math.exp(-1) / math.sqrt(math.pi))


@rule("silu", nn.SiLU)
def _silu(call: Call) -> float:
    return _SILU


@rule("mish", nn.Mish)
def _mish(call: Call) -> float:
    return _MISH


@rule("softplus", nn.Softplus)
def _softplus(call: Call) -> float | Constant:
    # the slope is a sigmoid
    threshold, beta = call.get("threshold", 20.0), call.get("beta", 1.0)
    if beta <= 0:
        return no_bound(f"softplus jumps where it becomes linear, at beta={beta:g}")
    if threshold < _SOFTPLUS_SEAMLESS:
        return no_bound(f"softplus jumps where it becomes linear, at threshold={threshold:g}")
    return 1.0


@rule("sigmoid", "special_expit", nn.Sigmoid)
def _sigmoid(call: Call) -> float:
    # s (1 - s) <= 1/4
    return 0.25


@rule("log_sigmoid", "logsigmoid", nn.LogSigmoid)
@rule("tanh", nn.Tanh)
@rule("tanhshrink", nn.Tanhshrink)
@rule("softsign", nn.Softsign)
@rule("sin", "cos", "atan", "arctan", "asinh", "arcsinh")
def _slope_one(call: Call) -> float:
    # derivatives 1 - s, 1 - tanh^2, tanh^2, 1 / (1 + |x|)^2, cos, -sin, 1 / (1 + x^2), 1 / sqrt(1 + x^2)
    return 1.0


@rule("hardswish", nn.Hardswish)
def _hardswish(call: Call) -> float:
    # (2 x + 3) / 6 at x = 3
    return 1.5


@rule("hardsigmoid", nn.Hardsigmoid)
def _hardsigmoid(call: Call) -> float:
    # x / 6 + 1/2 between -3 and 3
    return loosened(1 / 6)


@rule("hardshrink", nn.Hardshrink)
def _hardshrink(call: Call) -> float | Constant:
    if call.get("lambd", 0.5) <= 0:
        return 1.0
    return no_bound("hardshrink jumps at +-lambda")


@rule("threshold", nn.Threshold)
def _threshold(call: Call) -> float | Constant:
    if call.get("threshold") == call.get("value"):
        return 1.0
    return no_bound("threshold jumps at its threshold")


@rule("softmax", "softmin", "special_softmax", nn.Softmax, nn.Softmin, nn.Softmax2d)
def _softmax(call: Call) -> float:
    # the Jacobian diag(p) - p p^T is a covariance: largest for a fair coin, [[1, -1], [-1, 1]] / 4, of norm 1/2
    call.allows("dim")
    return 0.5


@rule("log_softmax", "special_log_softmax", nn.LogSoftmax)
def _log_softmax(call: Call) -> float | Constant:
    # the Jacobian 1 - 1 p^T is a projection of norm |1| |p| <= sqrt(n)
    dim = call.get("dim", None)
    if dim is None:
        return no_bound("log_softmax without dim")
    if touches_batch(call.x, dim):
        return no_bound("log_softmax runs over the batch dimension: no bound per sample")
    return root(max(call.x.shape[dim], 1))


@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout")
@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
def _dropout(call: Call) -> float | Constant:
    call.allows("p")
    if call.get("training", call.get("train", True)):
        return no_bound("dropout is active although the model is in eval mode: the output is random")
    return 1.0


@rule("torchvision.stochastic_depth")
def _stochastic_depth(call: Call) -> float | Constant:
    call.allows("p", "mode")
    if call.get("training", True):
        return no_bound("stochastic depth is active although the model is in eval mode: the output is random")
    return 1.0
