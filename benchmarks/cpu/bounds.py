"""Upper bounds of a convolution's norm from the literature, from their formulas; float64, square kernels, zero padding.

``weight`` is (Cout, Cin, k, k). A stride s turns into more channels first (``polyphase``): the strided convolution is a
convolution of stride 1 on the s * s interleaved parts of its input, with the kernel (Cout, Cin s^2, k', k'), k' =
ceil(k / s), and the parts together have the norm of the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_SWEEPS = 30  # of power iterations on reshaped kernels, whose values approach the bound from below


def polyphase(weight: Tensor, stride: int) -> Tensor:
    """The kernel of stride 1 on the interleaved parts of the input; taps outside the kernel are zeros."""
    if stride == 1:
        return weight
    cout, cin, k, _ = weight.shape
    wide = -(-k // stride)
    filled = F.pad(weight, (0, wide * stride - k, 0, wide * stride - k))
    parts = filled.reshape(cout, cin, wide, stride, wide, stride).permute(0, 1, 3, 5, 2, 4)
    return parts.reshape(cout, cin * stride * stride, wide, wide)


def frobenius(weight: Tensor, stride: int) -> float:
    """k' times the Frobenius norm: the simplest."""
    w = polyphase(weight, stride)
    return float(w.shape[-1] * w.norm())


def reshaped(weight: Tensor, stride: int) -> float:
    """k' times the norm of the Cout x (Cin k k) matrix (Tsuzuku, Sato, Sugiyama 2018)."""
    w = polyphase(weight, stride)
    return w.shape[-1] * float(torch.linalg.matrix_norm(w.flatten(1), 2))


def fantastic_four(weight: Tensor, stride: int) -> float:
    """k' times the least norm of four matrices made of the kernel (Singla, Feizi 2021)."""
    w = polyphase(weight, stride)
    cout, cin, h, width = w.shape
    matrices = (
        w.permute(0, 2, 1, 3).reshape(cout * h, cin * width),
        w.permute(0, 3, 1, 2).reshape(cout * width, cin * h),
        w.reshape(cout, cin * h * width),
        w.permute(0, 2, 3, 1).reshape(cout * h * width, cin),
    )
    return math.sqrt(h * width) * min(_largest(m) for m in matrices)


def tensor_norm(weight: Tensor, stride: int) -> float:
    """k' times the spectral norm of the kernel as a tensor of order 4 (Grishina, Gorbunov, Rakhuba 2024).

    By alternating maximisation from the best of three starts, so the value approaches the bound from below.
    """
    w = polyphase(weight, stride)
    generator = torch.Generator().manual_seed(0)
    best = 0.0
    for _ in range(3):
        vectors = [_unit(torch.randn(n, generator=generator, dtype=w.dtype)) for n in w.shape]
        value = 0.0
        for _ in range(_SWEEPS):
            for axis in range(4):
                contracted = _contract(w, vectors, axis)
                value = float(contracted.norm())
                vectors[axis] = contracted / max(value, 1e-300)
        best = max(best, value)
    return math.sqrt(w.shape[2] * w.shape[3]) * best


def gram_iteration_circular(weight: Tensor, stride: int, size: int, squarings: int = 5) -> float:
    """Norms at the frequencies of a ``size`` x ``size`` grid by Gram squarings (Delattre, Barthélemy, Araujo, Allauzen
    2023), over 1 - 2 floor(k' / 2) / size for zero padding (Pfister, Bresler 2019; Araujo et al. 2021)."""
    w = polyphase(weight, stride)
    margin = 1 - 2 * (w.shape[-1] // 2) / size
    if margin <= 0:
        return math.inf
    symbols = torch.fft.rfft2(w, s=(size, size)).permute(2, 3, 0, 1).reshape(-1, w.shape[0], w.shape[1])
    if symbols.shape[1] > symbols.shape[2]:
        symbols = symbols.mH
    gram, log_scale = symbols @ symbols.mH, torch.zeros(len(symbols), dtype=w.dtype)
    for _ in range(squarings):
        norm = torch.linalg.matrix_norm(gram)[:, None, None].clamp(min=1e-300)
        gram = gram / norm
        gram, log_scale = gram @ gram, 2 * (log_scale + norm.flatten().log())
    values = (torch.linalg.matrix_norm(gram).clamp(min=1e-300).log() + log_scale) / 2 ** (squarings + 1)
    return float(values.exp().max()) / margin


def gram_iteration_spatial(weight: Tensor, stride: int, squarings: int = 2) -> float:
    """The kernel convolved with its own adjoint again and again, and the largest sum of absolute rows (Delattre,
    Barthélemy, Allauzen 2024, for zero padding): the kernel grows to 2^t (k' - 1) + 1."""
    w = polyphase(weight, stride)
    if w.shape[0] < w.shape[1]:
        w = w.transpose(0, 1).flip(2, 3)  # the adjoint, whose Gram kernel has fewer channels
    log_scale = 0.0
    for _ in range(squarings):
        norm = max(float(w.norm()), 1e-300)
        w = w / norm
        log_scale = 2 * (log_scale + math.log(norm))
        # K^T * K: (Cin, Cin, 2k - 1, 2k - 1), by correlation of every pair of input channels
        k = w.shape[-1]
        by_input = w.transpose(0, 1)
        w = F.conv2d(by_input, by_input, padding=k - 1)
    rows = float(w.abs().sum(dim=(1, 2, 3)).max())
    return math.exp((math.log(max(rows, 1e-300)) + log_scale) / 2**squarings)


def _largest(matrix: Tensor) -> float:
    """By power iteration on the smaller Gram matrix."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    v = _unit(torch.randn(len(gram), generator=torch.Generator().manual_seed(0), dtype=gram.dtype))
    for _ in range(_SWEEPS):
        v = _unit(gram @ v)
    return math.sqrt(float((gram @ v).norm()))


def _contract(w: Tensor, vectors: Sequence[Tensor], keep: int) -> Tensor:
    """The tensor with all vectors but one."""
    for axis in reversed(range(4)):
        if axis != keep:
            w = torch.tensordot(w, vectors[axis], dims=([axis], [0]))
    return w


def _unit(x: Tensor) -> Tensor:
    return x / x.norm().clamp(min=1e-300)
