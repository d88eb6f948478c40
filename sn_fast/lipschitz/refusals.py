"""Modules and functions without a useful bound, and why."""

from __future__ import annotations

from torch import nn

from .rules import Call, Constant, joint_rule, no_bound

_DIVIDES = "divides by the deviation of its own input: no useful bound (eps alone keeps it finite)"
_ATTENTION = "dot products of activations: no finite bound (Kim, Papamakarios, Mnih 2021)"
_RECURRENT = "recurrent, its gates multiply activations: no rule"
_INTEGERS = "not differentiable in its input, which are indices"
_REASONS: dict[str, tuple[str | type[nn.Module], ...]] = {
    _DIVIDES: (
        *("layer_norm", "native_layer_norm", "group_norm", "instance_norm", "rms_norm"),
        *(nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.CrossMapLRN2d),
    ),
    "divides by the norm of its own input: no useful bound": ("normalize", "cosine_similarity", nn.CosineSimilarity),
    _ATTENTION: (
        *("scaled_dot_product_attention", "multi_head_attention_forward", nn.MultiheadAttention),
        *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder),
        nn.Transformer,
    ),
    _RECURRENT: (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
    _INTEGERS: ("embedding", "embedding_bag", "one_hot", nn.Embedding, nn.EmbeddingBag),
    "product of two activations: no finite bound": ("bilinear", "glu", nn.Bilinear, nn.GLU),
    "powers of activations grow without limit: no finite bound": ("pow", "ipow", "square", "exp", "expm1"),
    "its slope is infinite at zero: no finite bound": ("log", "sqrt", "rsqrt", "reciprocal", "log1p"),
    "its result jumps: no finite bound": (
        *("gt", "lt", "ge", "le", "eq", "ne", "argmax", "argmin", "argsort", "sign", "sgn", "round", "floor", "ceil"),
        *("trunc", "frac", "floordiv", "floor_divide", "mod", "remainder", "fmod", "bool", "long", "int", "short"),
    ),
    "no bound is known for it": (
        *("lp_pool1d", "lp_pool2d", "lp_pool3d", nn.LPPool1d, nn.LPPool2d, nn.LPPool3d),
        *("fractional_max_pool2d", "fractional_max_pool2d_with_indices", nn.FractionalMaxPool2d),
        *("fractional_max_pool3d", "fractional_max_pool3d_with_indices", nn.FractionalMaxPool3d),
    ),
}


def _refuse(reason: str) -> None:
    @joint_rule(*_REASONS[reason])
    def _no_bound(call: Call) -> Constant:
        return no_bound(reason)


for _reason in _REASONS:
    _refuse(_reason)
