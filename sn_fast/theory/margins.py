"""Margins of a classifier, and margins divided by its capacity as the paper plots them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from ..lipschitz.labels import check_logits, class_indices, two_sided
from ..reference.linear_map import compute_dtype
from .logarithms import exp, log, log_sum
from .norms import LayerNorms, NetworkNorms, network_norms
from .published import published_norms
from .schemes import Scheme, log_factor, positive

_MODES = (0, 1, 2)


def margins(logits: Tensor, y: Any) -> Tensor:
    """True logit minus the largest other: positive where the sample is classified right.

    As ``get_margins`` of the paper's analyses (Farnia, Zhang, Tse 2019). Gradients flow to the logits, so the negative
    margin can be the ``loss`` of an attack.

    Args:
        logits: (B, classes), outputs of the network at the clean or attacked samples; of a binary classifier with one
            logit (B, 1) or (B,), whose margin is z for class 1 and -z for class 0.
        y: B true classes, as a tensor, array or list of integers.

    Returns:
        (B,), in the units and the dtype of the logits, float32 at least.

    Raises:
        TypeError: ``logits`` is no floating-point tensor.
        ValueError: ``logits`` or ``y`` has another shape, or a class in ``y`` does not exist.
    """
    check_logits(logits)
    logits, binary = two_sided(logits.to(compute_dtype(logits)))
    y = class_indices(y, logits.shape, binary, logits.device)
    own = logits.gather(1, y[:, None])[:, 0]
    return own - logits.scatter(1, y[:, None], -math.inf).amax(dim=1)


def margin_scale(
    model: nn.Module,
    mode: int,
    *,
    example_input: Tensor,
    extra_correction: bool = False,
    eps_over_kappa: float = 1.0,
    certified: bool = False,
    reference: bool = False,
) -> float:
    """log of what ``normalized_margins`` divides by.

    With sigma_i = ||W_i||_2, P = prod_i sigma_i and d layers,

    mode 0: 1.  mode 1: P.  mode 2: P (1 + (eps/kappa) L), L = P sum_{i <= d} prod_{j <= i} sigma_j;

    ``extra_correction`` multiplies it by sqrt(sum_i ||W_i||_F^2 / sigma_i^2), with which mode 1 divides by sqrt(Phi) of
    ERM and mode 2 by that of FGM. Norms are those of the true linear maps, as in ``capacity``, and so are the networks
    that are refused; in mode 2 activations count as smooth.

    Args:
        model, example_input, certified: as in ``capacity``.
        eps_over_kappa: of mode 2.
        reference: the published formulas (``compute_margins``): in mode 2 P (1 + sum_{i < d} prod_{j < i} sigma_j),
            which starts at 2, and lacks the last product, the factor P and eps/kappa; in the correction
            ||K_i||_F^2 H W Cin / 4 for a kernel K_i at an input of (Cin, H, W), as if every stride were 2. Whatever is
            between the layers is left out, so that no network is refused that has layers with a norm.

    Raises:
        ValueError: an unknown mode, or eps_over_kappa that is negative or given with ``reference``; see also
            ``capacity``.
    """
    if mode not in _MODES or isinstance(mode, bool):
        raise ValueError(f"mode={mode!r} is unknown; choose 0, 1 or 2")
    ratio = positive("eps_over_kappa", eps_over_kappa, zero=True)
    if reference and ratio != 1:
        raise ValueError(f"eps_over_kappa={eps_over_kappa!r}: reference=True has it fixed at 1")
    norms = (published_norms if reference else network_norms)(model, example_input, certified=certified)
    scale = 0.0 if mode == 0 else norms.log_product
    if mode == 2:
        fgm = Scheme("fgm", eps=ratio, kappa=1.0)
        scale += _published_factor(norms) if reference else log_factor(fgm, norms.log_gradient_lipschitz)
    if extra_correction:
        ratios = log_sum(_published_ratio(layer) for layer in norms.layers) if reference else norms.log_ratio_sum
        scale += ratios / 2
    return norms.up(scale)


def normalized_margins(
    margins: Tensor,
    model: nn.Module,
    mode: int,
    *,
    example_input: Tensor,
    extra_correction: bool = False,
    eps_over_kappa: float = 1.0,
    certified: bool = False,
    reference: bool = False,
) -> Tensor:
    """Margins divided by a network's norms, to be compared between networks; see ``margin_scale``.

    Args:
        margins: (B,), of ``margins``.
        model, ..., reference: as in ``margin_scale``.

    Returns:
        (B,), float64.

    Raises:
        ValueError, TypeError: as ``margin_scale``; TypeError where ``margins`` is no floating-point tensor; ValueError
            where a layer is zero.
    """
    if not isinstance(margins, Tensor) or not margins.is_floating_point():
        found = getattr(margins, "dtype", type(margins).__name__)
        raise TypeError(f"margins is {found}; give a floating-point tensor, the result of margins(logits, y)")
    scale = margin_scale(
        model,
        mode,
        example_input=example_input,
        extra_correction=extra_correction,
        eps_over_kappa=eps_over_kappa,
        certified=certified,
        reference=reference,
    )
    if math.isinf(scale):
        raise ValueError(f"mode={mode}: a layer's weight is zero, so its norms cannot be divided by")
    half = scale / 2  # a divisor beyond float64 may leave a quotient within it
    return margins.double() * exp(-half) * exp(-half)


def _published_factor(norms: NetworkNorms) -> float:
    """log(1 + sum_{i < d} prod_{j < i} sigma_j), the empty product being 1."""
    products, so_far = [0.0], 0.0
    for layer in norms.layers:
        products.append(so_far)
        so_far += layer.log_norm
    return log_sum(products)


def _published_ratio(layer: LayerNorms) -> float:
    """log of ||K||_F^2 c / sigma^2."""
    if not layer.spectral or layer.kernel_frobenius is None:
        return layer.log_ratio
    count = math.prod(layer.input_shape) / 4 if len(layer.input_shape) > 1 else 1.0
    return 2 * (log(layer.kernel_frobenius) - log(layer.spectral)) + math.log(count)
